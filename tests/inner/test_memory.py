"""What "auto" takes: the fastest policies whose estimate fits, and an estimate that is about what is compiled."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.model.tiny import tiny_model
from ttt_e2e.inner import memory, read_batch
from ttt_e2e.inner.division import Weights
from ttt_e2e.inner.meta_gradient import adapt
from ttt_e2e.inner.step import MiniBatch
from ttt_e2e.model.parameters import split

B, T, b = 2, 256, 32
FAST_BYTES = 3 * 32 * 64 * 4  # of one sequence's fast weights: three matrices


@pytest.fixture(scope="module")
def model():
    """Sizes at which products and weights, not constants, take the memory."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "fast_intermediate_size": 64}
    sizes |= {"num_fast_blocks": 1, "sliding_window": 32, "compute_dtype": "float32", "param_dtype": "float32"}
    policies = {"trajectory": "auto", "remat": "auto", "mini_batch_size": b}
    return tiny_model(inner=policies, train={"seq_len": T}, **sizes)


def estimate(model, trajectory, remat, **inner) -> int:
    inner = dataclasses.replace(model.config.inner, trajectory=trajectory, remat=remat, **inner)
    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    return memory.held_bytes(inner, model.graphdef, model.params["fast"], model.params["slow"], tokens)


@pytest.fixture(scope="module")
def estimates(model):
    return {policies: estimate(model, *policies) for policies in memory.FASTEST_FIRST}


@pytest.fixture
def choose(model, estimates, monkeypatch):
    """(budget, changes of the inner configuration) -> policies chosen, by estimates made once for all tests."""
    monkeypatch.setattr(memory, "held_bytes", lambda inner, *_: estimates[inner.trajectory, inner.remat])

    def choose(budget, **inner):
        inner = dataclasses.replace(model.config.inner, **inner)
        chosen, needed = memory.choose(inner, None, None, None, None, budget)
        assert needed == estimates[chosen.trajectory, chosen.remat]
        return chosen.trajectory, chosen.remat

    return choose


def test_the_less_memory_the_slower_and_the_smaller(choose, estimates):
    taken, budget = [], 2**40
    while not taken or taken[-1] != choose(budget):
        taken.append(choose(budget))
        budget = estimates[taken[-1]] - 1
    places = [memory.FASTEST_FIRST.index(policies) for policies in taken]
    assert places[0] == 0 and places == sorted(places) and len(places) >= 3
    assert "delta" not in {trajectory for trajectory, _ in taken}  # it changes results
    assert estimates[choose(1)] == min(estimates.values())  # what fits nowhere


def test_what_is_chosen_by_hand_stays(choose):
    assert choose(2**40, trajectory="segment") == ("segment", "keep")
    assert choose(2**40, remat="block") == ("store", "block")
    assert choose(1, trajectory="store", remat="mini_batch") == ("store", "mini_batch")


def test_trajectories_cost_what_they_store(model, estimates):
    store = estimates["store", "mini_batch"]
    assert store - estimate(model, "delta", "mini_batch") == (T // b) * B * FAST_BYTES // 2
    assert estimate(model, "segment", "mini_batch", segment_length=4) < store


@pytest.mark.parametrize("remat", ["keep", "mini_batch"])
def test_the_estimate_is_about_what_the_compiled_program_takes(model, estimates, remat):
    inner = dataclasses.replace(model.config.inner, trajectory="store", remat=remat)

    def loss(params, tokens):
        fast = jax.tree.map(lambda w: jnp.broadcast_to(w, (B, *w.shape)), params["fast"])
        options = {"inner": inner, "learning_rate": 1.0, "bos_id": 0}
        return read_batch(model.graphdef, fast, params["slow"], tokens, **options).loss.mean()

    tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(model.params, tokens).compile()
    ratio = estimates["store", remat] / compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < ratio < 2, ratio


@pytest.mark.parametrize("remat", ["mini_batch", "block"])
def test_a_longer_sequence_adds_one_trajectory_entry_and_its_keys_and_values(model, remat):
    """And of each mini-batch what it reads and the gradient at its hidden states; the compiled program, no more."""
    inner = dataclasses.replace(model.config.inner, trajectory="store", remat=remat)
    suffix_def, fast, slow = split(model.merge().make_suffix())
    D, G, H = (getattr(model.config.model, name) for name in ("hidden_size", "num_key_value_heads", "head_dim"))

    def temp_bytes(num_mini_batches):
        shape = (B, num_mini_batches, b)
        mini_batches = MiniBatch(
            jnp.zeros((*shape, D), jnp.float32), jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool)
        )

        def loss(fast, slow, x):
            read = partial(adapt, suffix_def, inner, Weights())
            return read(fast, slow, mini_batches._replace(hidden=x), jnp.float32(1))[0].sum()

        fast_B = jax.tree.map(lambda w: jnp.broadcast_to(w, (B, *w.shape)), fast)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return gradient.lower(fast_B, slow, mini_batches.hidden).compile().memory_analysis().temp_size_in_bytes

    keys_and_values, hidden, scalars = 2 * b * G * H * 4, b * D * 4, b * (4 + 1 + 2 * 4) + 4
    of_mini_batch = B * (FAST_BYTES + keys_and_values + 2 * hidden + scalars)
    assert temp_bytes(16) - temp_bytes(8) <= 8 * 1.01 * of_mini_batch


def test_reading_with_a_policy_left_open_is_a_mistake(model):
    with pytest.raises(ValueError, match="still 'auto'"):
        read_batch(
            model.graphdef,
            model.params["fast"],
            model.params["slow"],
            jnp.zeros((B, T + 1), jnp.int32),
            inner=model.config.inner,
            learning_rate=1.0,
            bos_id=0,
        )
