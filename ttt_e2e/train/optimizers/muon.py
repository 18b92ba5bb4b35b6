"""Muon for the matrices of the blocks, AdamW for embedding, head and norms. Decay on every parameter."""

import jax
import optax

from ttt_e2e.config import OptimizerConfig


def make(config: OptimizerConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Optax's Muon, its updates scaled to the root mean square of AdamW's, which makes AdamW's learning rates serve."""
    return optax.contrib.muon(
        learning_rate,
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=0.2,
    )


def _matrices(params):
    """Which dimensions of a parameter are a matrix's rows and columns; None = left to AdamW.

    The blocks of a stack are one array [L, in, out]: each block's matrix is orthogonalized by itself. In two dimensions
    are the stacked norms [L, D], and embedding and head.
    """
    matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
    return jax.tree.map(lambda x: matrix if x.ndim == 3 else None, params)
