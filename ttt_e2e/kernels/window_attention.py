"""The public operation."""

from ttt_e2e.kernels import reference


def window_attention(q_TNH, k_SGH, v_SGH, *, window: int, num_empty=0):
    """Causal attention of the last T of S positions to the `window` most recent ones, themselves included.

    Args:
      q_TNH: queries; they are the last T of the S positions (S >= T).
      k_SGH: keys; N must be a multiple of G (grouped-query heads).
      v_SGH: values.
      window: k, number of positions a query sees; 0 = all before it.
      num_empty: how many leading keys are empty (may be traced); no query sees them.

    Returns:
      Attention output [T, N, H] in the dtype of the values.
    """
    return reference.attend(q_TNH, k_SGH, v_SGH, window=window, num_empty=num_empty)
