"""Next-token loss with its tangent (JVP), and the gradients of both, in closed form over blocks of the vocabulary.

With logits l = x W, p = softmax(l), y the one-hot target, and tangents of x alone (the head is a slow weight):

    nll = lse - l_y,          its gradient at x:  g = W p - W_y
    nll_dot = <g, x_dot>

and for cotangents (a, b) of (nll, nll_dot), with l_dot = x_dot W, mu = <p, l_dot> = nll_dot + l_dot_y and
q = p (l_dot - mu), the derivative of p along x_dot:

    x_bar = a g + b W q       x_dot_bar = b g       W_bar = x^T (a (p - y) + b q) + x_dot^T b (p - y)

g is kept from the forward pass, so that second order costs 7 products with the head in all: 2 forward (logits, g) and 5
in reverse (l and l_dot as one product over stacked rows, W q, and W_bar as one product over a stacked contraction).
The reference is `loss.token_nll` under autodiff.

The head may be one device's columns (loss.py). A product with it is then one term of a sum over the devices; each sum
is computed once, after all blocks.

Shapes: `T` tokens; the public functions also take several sequences, [..., T], and flatten them to one axis T, so that
the head's gradient is summed over all of them in one product. `D` model width, `V` columns of the head on this device,
`C` of a block of them, `R` = 2 T rows, values and tangents.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttt_e2e.model import loss
from ttt_e2e.model.loss import Columns, columns, join_softmax
from ttt_e2e.model.parameters import at_least_float32
from ttt_e2e.model.parts import sum_to_all


class HeadPass(NamedTuple):
    """Residuals of the forward pass over the head."""

    nll_T: jax.Array
    lse_T: jax.Array  # log-sum-exp: log of the softmax's denominator
    gradient_TD: jax.Array  # g: gradient of each token's NLL at its own hidden state


def head_pass(x_TD, head_DV, targets_T, vocab_size: int = 0) -> HeadPass:
    """Computes the NLL of the targets and its gradient at the hidden states, by two products with the head per block.

    The softmax is accumulated over blocks as in flash attention: largest logit so far, sum of exponentials relative to
    it, and `mean_TD`, the sum of head columns weighted by these exponentials.
    """
    shape, x_TD, targets_T = targets_T.shape, _rows(x_TD), targets_T.reshape(-1)
    T, D = x_TD.shape
    wide = at_least_float32(x_TD.dtype)
    head = columns(head_DV, vocab_size)

    def add_block(carry, block, width):
        highest_T, total_T, mean_TD = carry
        head_DC, _, is_new_C = _block(head, block, width, x_TD.dtype)
        logits_TC = jnp.where(is_new_C, _product(x_TD, head_DC), loss.MASKED_LOGIT)
        new_highest_T = jnp.maximum(highest_T, logits_TC.max(axis=-1))
        p_TC = jnp.exp(logits_TC - new_highest_T[:, None])
        shrink_T = jnp.exp(highest_T - new_highest_T)
        mean_TD = mean_TD * shrink_T[:, None] + _product(p_TC.astype(x_TD.dtype), head_DC.T)
        return (new_highest_T, total_T * shrink_T + p_TC.sum(axis=-1), mean_TD), None

    carry = (jnp.full(T, -jnp.inf, wide), jnp.zeros(T, wide), jnp.zeros((T, D), wide))
    (highest_T, total_T, mean_TD), _ = _scan_blocks(add_block, carry, T, head_DV.shape[1])
    target_head_TD = head.of_targets(targets_T, x_TD.dtype)
    target_T = jnp.einsum("td,td->t", x_TD, target_head_TD, preferred_element_type=wide)
    lse_T, target_T = join_softmax(head.divided, highest_T, total_T, target_T)
    mean_TD = mean_TD * jnp.exp(highest_T - lse_T)[:, None] if head.divided else mean_TD / total_T[:, None]
    gradient_TD = sum_to_all((mean_TD - target_head_TD).astype(x_TD.dtype), head.divided)
    return HeadPass((lse_T - target_T).reshape(shape), lse_T.reshape(shape), gradient_TD.reshape(*shape, D))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def dual_nll(x_TD, x_dot_TD, head_DV, targets_T, forward: HeadPass, vocab_size: int = 0):
    """Returns (nll [T], nll_dot [T]): the NLL, as `forward` has it, and its tangent along x_dot.

    forward: `head_pass` of the same arguments. Its values are used instead of being computed again; no derivative is
        taken with respect to it.

    Differentiable once, in reverse, in x, x_dot and the head.
    """
    wide = at_least_float32(x_TD.dtype)
    return forward.nll_T, jnp.einsum("...td,...td->...t", forward.gradient_TD, x_dot_TD, preferred_element_type=wide)


def _dual_nll_forward(x_TD, x_dot_TD, head_DV, targets_T, forward: HeadPass, vocab_size: int):
    nll_T, nll_dot_T = dual_nll(x_TD, x_dot_TD, head_DV, targets_T, forward, vocab_size)
    return (nll_T, nll_dot_T), (x_TD, x_dot_TD, head_DV, targets_T, forward, nll_dot_T)


def _dual_nll_reverse(vocab_size: int, residuals, cotangents):
    """Computes (x_bar, x_dot_bar, W_bar) by the formulas at the top of this file."""
    x, x_dot, head_DV, targets, forward, nll_dot = residuals
    x_TD, x_dot_TD, gradient_TD = map(_rows, (x, x_dot, forward.gradient_TD))
    targets_T, lse_T, nll_dot_T = (a.reshape(-1) for a in (targets, forward.lse_T, nll_dot))
    a_T1, b_T1 = (c.reshape(-1, 1) for c in cotangents)
    T, D = x_TD.shape
    dtype, wide = x_TD.dtype, at_least_float32(x_TD.dtype)
    head = columns(head_DV, vocab_size)
    target_dot_T = jnp.einsum("td,td->t", x_dot_TD, head.of_targets(targets_T, dtype), preferred_element_type=wide)
    mu_T = nll_dot_T + sum_to_all(target_dot_T, head.divided)
    stacked_RD = jnp.concatenate([x_TD, x_dot_TD])  # the head is read once for both

    def add_block(carry, block, width):
        curvature_TD, head_bar_DV = carry
        head_DC, ids_C, is_new_C = _block(head, block, width, dtype)
        logits_TC, logits_dot_TC = jnp.split(_product(stacked_RD, head_DC), 2)
        p_TC = jnp.where(is_new_C, jnp.exp(logits_TC - lse_T[:, None]), 0)
        q_TC = p_TC * (logits_dot_TC - mu_T[:, None])
        p_minus_y_TC = p_TC - (is_new_C & (ids_C == targets_T[:, None]))
        curvature_TD = curvature_TD + _product(q_TC.astype(dtype), head_DC.T)
        logits_bar_RC = jnp.concatenate([a_T1 * p_minus_y_TC + b_T1 * q_TC, b_T1 * p_minus_y_TC]).astype(dtype)
        head_bar_DC = _product(stacked_RD.T, logits_bar_RC).astype(head_DV.dtype)
        before_DC = jax.lax.dynamic_slice_in_dim(head_bar_DV, block[0], width, axis=1)
        head_bar_DV = jax.lax.dynamic_update_slice_in_dim(head_bar_DV, before_DC + head_bar_DC, block[0], axis=1)
        return (curvature_TD, head_bar_DV), None

    carry = (jnp.zeros((T, D), wide), jnp.zeros_like(head_DV))
    (curvature_TD, head_bar_DV), _ = _scan_blocks(add_block, carry, T, head_DV.shape[1])
    curvature_TD = sum_to_all(curvature_TD.astype(dtype) if head.divided else curvature_TD, head.divided)
    x_bar_TD = (a_T1 * gradient_TD + b_T1 * curvature_TD).astype(dtype)
    x_dot_bar_TD = (b_T1 * gradient_TD).astype(dtype)
    return x_bar_TD.reshape(x.shape), x_dot_bar_TD.reshape(x.shape), head_bar_DV, None, None


dual_nll.defvjp(_dual_nll_forward, _dual_nll_reverse)


def _rows(a):
    """Flattens [..., T, D] to [T, D]."""
    return a.reshape(-1, a.shape[-1])


def _scan_blocks(add_block, carry, T: int, V: int):
    """Scans over blocks of the vocabulary, as few as keep their logits within `loss.MAX_LOGITS`.

    All blocks have the same width. The last one ends with the vocabulary, and so may overlap with the one before.
    add_block: (carry, (first column of the block, first column that is in no block before)) -> (carry, None).
    """
    num_blocks = -(-V // min(V, max(1, loss.MAX_LOGITS // T)))
    width = -(-V // num_blocks)
    first_new = jnp.arange(num_blocks) * width
    blocks = (jnp.minimum(first_new, V - width), first_new)
    add_block = partial(add_block, width=width)
    if num_blocks == 1:
        return add_block(carry, (0, 0))
    return jax.lax.scan(add_block, carry, blocks)


def _block(head: Columns, block, width: int, dtype):
    """Returns (columns [D, C], token ids [C], whether each column is neither padding nor in a block before [C])."""
    start, first_new = block
    place_C = start + jnp.arange(width)
    head_DC = jax.lax.dynamic_slice_in_dim(head.head_DC, start, width, axis=1)
    ids_C = head.first + place_C
    return head_DC.astype(dtype), ids_C, (place_C >= first_new) & (ids_C < head.vocab_size)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=at_least_float32(a.dtype))
