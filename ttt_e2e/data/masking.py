"""The mask of a loss: which targets count in it."""


def is_target(tokens, bos_id: int):
    """Mask of the targets that count, of the shape of `tokens` (NumPy or JAX): all but BOS; all if `bos_id` is 0."""
    return (tokens != bos_id) | (bos_id == 0)
