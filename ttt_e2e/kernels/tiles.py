"""The algebra of every pass over one block of queries and all the keys that it can see, in plain jax.numpy.

Source: docs/kernels.md. `o` and `lse` are the forward's outputs, `do` and `dlse` their cotangents, `q_dot` the tangent of
`q` and so on; mu is the tangent of lse. All of a row's keys are here, so its statistics are plain sums over the
last axis; nothing is accumulated and rescaled from tile to tile, and the tangent is centred before it is summed
(in bfloat16 it would otherwise cancel where |mu| is large).

Shapes: rows [..., R, t, H] for t queries of each of the R query heads that share a key head, row statistics
[..., R, t, 1], keys [..., W, H], scores [..., R, t, W]. Tangents of keys may cover the last w of the W keys only (the others are
constant); likewise the gradients with respect to keys cover as many as `num_keys` says. Matrix products take operands in the dtype of the inputs and accumulate at least in
float32; scores and statistics are float32 or wider.
"""

import jax
import jax.numpy as jnp

# Finite, unlike finfo.min and -inf: with those the second derivative of a softmax is NaN.
MASKED_SCORE = -1e30
