"""Counts the FLOPs of a training step, and the peak FLOP/s of the devices."""

import jax

from ttt_e2e import targets
from ttt_e2e.config import Config
from ttt_e2e.model import abstract_transformer
from ttt_e2e.model.stacks import num_blocks


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of all devices together, or None where it is unknown."""
    return targets.of_device(jax.devices()[0]).peak_flops * jax.device_count() or None


def model_flops_per_token(config: Config) -> float:
    """Counts the FLOPs of one training step per token, without rematerialisation.

    In units of the forward product of each matrix: 3 without an inner loop (forward, gradient at the input, gradient at
    the weight); with one, in the suffix and the head, 7 for a slow and 10 for a fast matrix (docs/meta_gradient.md), 4
    and 6 under the first-order gradient.
    """
    model, seq_len = config.model, config.train.seq_len
    head = 2 * model.hidden_size * model.vocab_size
    transformer, mlp = abstract_transformer(model), 6 * model.hidden_size * model.intermediate_size

    def of_blocks(stacks: dict) -> float:
        return sum(num_blocks(stack) * (stack.flops(seq_len) + mlp) for stack in stacks.values())

    prefix, suffix = of_blocks(transformer.prefix_stacks), of_blocks(transformer.suffix_stacks)
    if not model.num_fast_blocks:
        return 3 * (prefix + head)
    fast = model.num_fast_blocks * 6 * model.hidden_size * model.fast_intermediate_size
    slow_units, fast_units = (4, 6) if config.inner.gradient == "first_order" else (7, 10)
    return 3 * prefix + slow_units * (suffix + head) + fast_units * fast
