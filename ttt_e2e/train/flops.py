"""What a training step costs, and what its devices could do in that time."""

import jax

from ttt_e2e import targets
from ttt_e2e.config import Config
from ttt_e2e.model import abstract_transformer


def peak_flops() -> float | None:
    """Peak FLOP/s of all devices together, or None where it is not known."""
    return targets.of_device(jax.devices()[0]).peak_flops * jax.device_count() or None


def model_flops_per_token(config: Config) -> float:
    """FLOPs of one training step per token that the method itself needs, rematerialisation left out.

    In units of one forward of each matrix product: 3 without an inner loop (forward, and the gradients at the input
    and at the weight); with one, in the suffix and the head, 7 for a slow and 10 for a fast matrix (the forward
    scan's activations kept; docs/meta_gradient.md), 4 and 6 under the first-order gradient.
    """
    model, seq_len = config.model, config.train.seq_len
    head = 2 * model.hidden_size * model.vocab_size
    mixers = [stack.mixer.flops(seq_len) for stack in abstract_transformer(model).stacks.values()]
    block = sum(mixers) / len(mixers) + 6 * model.hidden_size * model.intermediate_size
    prefix, suffix = model.num_prefix_blocks * block, model.num_fast_blocks * block
    if not model.num_fast_blocks:
        return 3 * (prefix + head)
    fast = model.num_fast_blocks * 6 * model.hidden_size * model.fast_intermediate_size
    slow_units, fast_units = (4, 6) if config.inner.gradient == "first_order" else (7, 10)
    return 3 * prefix + slow_units * (suffix + head) + fast_units * fast
