"""What a training step costs, and what its devices could do in that time."""

import jax

from ttt_e2e import targets
from ttt_e2e.config import Config, ModelConfig


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None where it is not known."""
    return targets.of_device(jax.devices()[0]).peak_flops * jax.device_count() or None


def model_flops_per_token(config: Config) -> float:
    """FLOPs of one training step per token that the method itself needs, rematerialisation left out.

    In units of one forward of each matrix product: 3 without an inner loop (forward, and the gradients at the input
    and at the weight); with one, in the suffix and the head, 7 for a slow and 10 for a fast matrix (the forward
    scan's activations kept; docs/meta_gradient.md), 4 and 6 under the first-order gradient.
    """
    model = config.model
    head = 2 * model.hidden_size * model.vocab_size
    prefix = model.num_prefix_blocks * _block_flops(model, config.train.seq_len)
    if not model.num_fast_blocks:
        return 3 * (prefix + head)
    suffix = model.num_fast_blocks * _block_flops(model, config.train.seq_len)
    fast = model.num_fast_blocks * 6 * model.hidden_size * model.fast_intermediate_size
    slow_units, fast_units = (4, 6) if config.inner.gradient == "first_order" else (7, 10)
    return 3 * prefix + slow_units * (suffix + head) + fast_units * fast


def _block_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of a block's slow matrices and attention, averaged over the mixer pattern."""
    D, H = model.hidden_size, model.head_dim
    projections = 4 * D * H * (model.num_attention_heads + model.num_key_value_heads)
    seen = [(seq_len + 1) / 2 if not k or k >= seq_len else k - k * (k - 1) / (2 * seq_len) for k in model.windows]
    attention = 4 * model.num_attention_heads * H * sum(seen) / len(seen)
    return projections + attention + 6 * D * model.intermediate_size
