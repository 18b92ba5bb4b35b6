"""Window attention: one operation, one plain reference, and one file per backend (`backends.REGISTRY`).

Words of all files here. *lse* is the log-sum-exp of a row of scores, that is the log of its softmax's denominator: with
it the softmax can be computed again from queries and keys, tile by tile. A name that ends in `_dot` is the tangent of
the name without it, one that ends in `_bar` its cotangent. *Rows* are queries and what belongs to them (output,
lse, ...); a *statistic* is one number a row. *Moving* keys have tangents; the others are constants. The *band* is the
part of the score matrix, queries x keys, that the window leaves visible. The algebra is derived in docs/kernels.md.
"""
