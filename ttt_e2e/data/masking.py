"""The mask of a loss: which targets count in it."""


def is_target(tokens, bos_id: int):
    """Mask of the targets that count, of the shape of `tokens` (NumPy or JAX): all but BOS.

    bos_id: of the tokens that do not count; 0 = none, -1 = token 0.
    """
    return (tokens != max(bos_id, 0)) | (bos_id == 0)
