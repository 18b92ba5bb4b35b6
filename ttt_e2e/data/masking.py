"""Which targets count in a loss."""


def is_target(tokens, bos_id: int):
    """Whether each of `tokens`, an array of NumPy or JAX, counts as a target: BOS does not; where it is 0, all do."""
    return (tokens != bos_id) | (bos_id == 0)
