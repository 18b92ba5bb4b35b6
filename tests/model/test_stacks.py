"""Stacks and segments: which blocks are stacked, and in which order they run."""

import random

import jax
import jax.numpy as jnp
import pytest

from tests.model.tiny import tiny_model
from ttt_e2e.config import ModelConfig
from ttt_e2e.model import abstract_transformer, stacks
from ttt_e2e.model.stacks import Segment, num_blocks, segments_of

WWA = ("window", "window", "attention")


@pytest.mark.parametrize(
    ("kinds", "pattern_length", "expected"),
    [
        (WWA * 2, 3, [Segment(WWA, 2)]),
        (WWA, 3, [Segment(WWA, 1)]),  # as many stacks as slots, though two would do: checkpoints have them
        ("aaaa", 2, [Segment(("a", "a"), 2)]),
        ("aaa", 12, [Segment(("a",), 3)]),
        ("wwwwwawww", 12, [Segment(("w",), 5), Segment(("a",), 1), Segment(("w",), 3)]),
        ("wwwwwa" * 5 + "ww", 32, [Segment(tuple("wwwwwa"), 5), Segment(("w",), 2)]),
        ("wmw", 2, [Segment(("w", "m", "w"), 1)]),
    ],
)
def test_segments_have_few_stacks(kinds, pattern_length, expected):
    assert segments_of(kinds, pattern_length) == expected


def test_segments_are_the_blocks_in_order():
    draw = random.Random(0)
    for _ in range(200):
        kinds = tuple(draw.choice("wam") for _ in range(draw.randint(1, 20)))
        segments = segments_of(kinds, draw.randint(1, 20))
        assert sum((segment.pattern * segment.periods for segment in segments), ()) == kinds
        assert sum(len(segment.pattern) for segment in segments) <= len(kinds)


@pytest.mark.parametrize("mixer", ["window", "window,attention"])
def test_a_period_of_several_blocks_is_recomputed_one_by_one(mixer, monkeypatch):
    """Each behind a barrier; otherwise compilers recompute them all at once, and hold the residuals of all."""
    barriers, checkpoint = [], jax.checkpoint

    def recorded(run, *, prevent_cse, **options):
        barriers.append(prevent_cse)
        return checkpoint(run, prevent_cse=prevent_cse, **options)

    model = tiny_model(
        num_hidden_layers=4, sliding_window=4, mixer=mixer, param_dtype="float32", compute_dtype="float32"
    )
    monkeypatch.setattr(stacks.jax, "checkpoint", recorded)
    transformer = model.merge()
    jax.eval_shape(lambda: transformer.run_prefix(transformer.embed(jnp.arange(8))))
    assert barriers and set(barriers) == {"," in mixer}


def test_stacks_are_named_in_the_order_in_which_they_run():
    kinds = "window,window,attention,window,window,attention"
    model = abstract_transformer(ModelConfig(num_hidden_layers=6, num_fast_blocks=2, sliding_window=8, mixer=kinds))
    blocks = {name: (stack.kind, num_blocks(stack), stack.segment) for name, stack in model.stacks.items()}
    assert blocks == {
        "prefix_0": ("window", 2, 0),
        "prefix_1": ("attention", 1, 1),
        "prefix_2": ("window", 1, 1),
        "suffix_0": ("window", 1, 0),
        "suffix_1": ("attention", 1, 0),
    }
