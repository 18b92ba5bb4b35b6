"""Test-time training with key-value binding, in large chunks (LaCT, arXiv 2505.23884).

The memory of a head is a network f(x) = w1 (silu(w0 x) * (w2 x)), whose matrices learn, while a sequence is read, that
keys have their values. Each chunk of tokens is read, y_t = f(q_t), with the matrices that the chunks before it left
behind; then it is learned from, by one step on -<f(k_t), v_t> of its tokens, each with a rate for each matrix:

    G_i = sum over t of the chunk of rate_ti d<f(k_t), v_t>/dW_i        at the matrices before the chunk
    U_i = G_i + m U_i of the chunk before                               m: mean momentum of the chunk's tokens
    W_i = W_i + U_i, whose rows (weights into one output) are scaled to their norms at the beginning of the sequence

`reference.py` is this and nothing else, by autodiff; `chunked.py` is the same in closed form, and in pieces.
"""

from ttt_e2e.kernels.key_value_binding.chunked import Memory, State, Tokens, Weights, empty, extend, normed, whole

__all__ = ["Memory", "State", "Tokens", "Weights", "empty", "extend", "normed", "whole"]
