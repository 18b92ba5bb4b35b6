"""Depthwise causal convolution along a sequence, in pieces if need be.

Shapes: `T` positions, `C` channels, `W` width of the convolution, `P` = (W - 1) dilation positions before the first.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx


def causal_conv(x_TC, weight_CW, before_PC, *, dilation: int = 1):
    """Computes y_t = sum over w of weight[:, w] x_{t - dilation (W - 1 - w)}, [T, C], in the dtype of x.

    before_PC: the inputs before the first position; zeros at the beginning of a sequence.
    """
    T, W = len(x_TC), weight_CW.shape[1]

    @partial(jax.checkpoint, prevent_cse=False)  # it costs little, and would leave W residuals of the size of x
    def convolve(x_TC, weight_CW, before_PC):
        inputs = jnp.concatenate([before_PC, x_TC])
        shifted = (jax.lax.slice_in_dim(inputs, w * dilation, w * dilation + T) for w in range(W))
        return sum(weight_CW[:, w] * x_TC for w, x_TC in enumerate(shifted))

    return convolve(x_TC, *(a.astype(x_TC.dtype) for a in (weight_CW, before_PC)))


def last_inputs(x_TC, before_PC, count=None):
    """Computes `before_PC` of the piece after this one, in the dtype of `before_PC`.

    count: number of positions of x that are tokens, with padding after them; None = all.
    """
    inputs = jnp.concatenate([before_PC, x_TC.astype(before_PC.dtype)])
    return jax.lax.dynamic_slice_in_dim(inputs, len(x_TC) if count is None else count, len(before_PC))


def conv_init(rngs: nnx.Rngs, shape: tuple[int, ...], W: int):
    """Draws initial weights or biases of a convolution, uniform between -W^-1/2 and W^-1/2, as PyTorch does."""
    return jax.random.uniform(rngs.params(), shape, minval=-(W**-0.5), maxval=W**-0.5)
