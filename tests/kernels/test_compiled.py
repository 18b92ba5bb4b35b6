"""What the compiled programs of window attention do: FLOPs, memory, arrays, size. Shapes: see cases.py."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.cases import Case
from ttt_e2e.bench import compiled
from ttt_e2e.kernels.attention import bands

# Matrix products per score, of what `passes` compiles: forward; with reverse; with tangent; all, and second reverse.
PRODUCTS = {"forward": 2, "reverse": 7, "tangent": 6, "reverse_of_tangent": 21}
WIDE = ("q", "k", "v")


def passes(case: Case, backend="xla") -> dict:
    def attend(x):
        return case.attend(x, backend)

    def reverse(x, y, bars):
        out, pullback = jax.vjp(attend, x)
        return out, pullback(bars[0])

    def tangent(x, y, bars=None):
        return jax.jvp(lambda x: case.attend(x, backend, derivatives="reverse_of_tangent"), (x,), (y,))

    def reverse_of_tangent(x, y, bars):
        out, pullback = jax.vjp(tangent, x, y)
        return out, pullback(bars)

    return {
        "forward": lambda x, y, bars: attend(x),
        "reverse": reverse,
        "tangent": tangent,
        "reverse_of_tangent": reverse_of_tangent,
    }


@cache
def measured(case: Case, name: str) -> compiled.Measured:
    x = case.problem(dtype=jnp.float32)
    return compiled.measure(passes(case)[name], x, x, (x["q"], x["q"]))


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "case",
    [
        Case(T=1024, N=2, G=2, H=32, window=128),
        Case(T=128, C=128, N=2, G=2, H=32, window=128),
        Case(T=512, N=2, G=1, H=80, window=0),
    ],
    ids=["windowed", "mini-batch", "full"],
)
def test_flops_are_within_a_third_of_the_band(case, name):
    band = 2 * case.N * case.H * bands.num_visible(case.T, case.T + case.C, case.window)
    assert measured(case, name).flops <= 1.3 * PRODUCTS[name] * band


@pytest.mark.parametrize("name", PRODUCTS)
def test_memory_grows_linearly_and_the_program_does_not(name):
    short, long = (measured(Case(T=T, N=1, G=1, H=16, window=64), name) for T in (1024, 4096))
    assert long.temp_bytes <= 4.2 * short.temp_bytes
    lines = [len(m.call.as_text().splitlines()) for m in (short, long)]
    assert lines[1] <= 1.02 * lines[0]


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(
    "case", [Case(T=480, N=1, G=1, H=8, window=96), Case(T=72, C=96, N=1, G=1, H=8, window=96)], ids=["T x T", "b x S"]
)
def test_no_array_is_queries_by_keys(case, name):
    sizes = f"{case.T},{case.T + case.C}"
    arrays = re.findall(r"\w+\[([\d,]*)\]", measured(case, name).call.as_text())
    assert arrays and not [a for a in arrays if a.endswith(sizes)]


def test_nothing_that_large_is_saved_for_the_reverse():
    case = Case(T=256, N=2, G=2, H=8, window=64)
    x = case.problem(dtype=jnp.float32)
    _, pullback = jax.vjp(passes(case)["tangent"], x, x)
    saved = sum(a.size for a in jax.tree.leaves(pullback))
    assert saved <= 12 * x["q"].size  # q, k, v, o, their tangents, lse and mu, and copies in the layout of the op


def test_constant_cached_keys_cost_no_tangents():
    """In the passes of an inner gradient: three of forward's and reverse's seven products are of the new keys alone."""
    case = Case(T=32, C=480, N=2, G=2, H=16, window=480)
    x = case.problem(dtype=jnp.float32)

    def flops(moving):
        def reverse(x, bar):
            return jax.vjp(lambda z: case.attend(x | z), {name: x[name] for name in moving})[1](bar)

        def reverse_of_tangent(x, y, bar):
            def along(x):
                def attend(z):
                    return case.attend(x | z, derivatives="reverse_of_tangent")

                return jax.jvp(attend, ({n: x[n] for n in moving},), ({n: y[n] for n in moving},))[1]

            return jax.vjp(along, x)[1](bar)

        first = compiled.measure(reverse, x, x["q"]).flops
        return first, compiled.measure(reverse_of_tangent, x, x, x["q"]).flops

    constant, all_keys = flops(WIDE), flops(list(x))
    assert constant[0] < 0.8 * all_keys[0]
    assert constant[1] < 0.85 * all_keys[1]


@pytest.mark.parametrize(
    "T, S, window", [(1, 1, 0), (7, 7, 1), (100, 100, 13), (64, 200, 0), (300, 300, 64), (50, 90, 60)]
)
def test_plan_gives_every_block_all_that_it_sees(T, S, window):
    band = bands.plan(T, S, window)
    k = window or S
    blocks = [(b, s.num_keys) for s in band.segments for b in range(s.first_block, s.last_block)]
    assert [b for b, _ in blocks] == list(range(-(-T // band.block)))
    for block, num_keys in blocks:
        first = S - T + block * band.block
        last = min(first + band.block, S) - 1
        stop = int(band.stop(block, num_keys))
        assert stop - num_keys <= max(0, first - k + 1)
        assert last < stop <= S
    visible = sum(min(k, S - T + i + 1) for i in range(T))
    assert bands.num_visible(T, S, window) == visible
