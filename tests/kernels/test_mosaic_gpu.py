"""The Hopper kernels: every pass, interpreted, against XLA's; rounding; their lowering. Shapes: see xla.py."""

import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from tests.kernels.cases import relative_error
from ttt_e2e.bench.attention_check import PASSES, pass_operands
from ttt_e2e.kernels.attention import bands, problems, xla
from ttt_e2e.kernels.attention.hopper import passes as mosaic_gpu
from ttt_e2e.targets import marks

interpreted = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="JAX interprets these kernels from 0.11.2 on")


class Problem(NamedTuple):
    """Sizes of what the passes are given; tangents are of the last L keys, gradients of all."""

    T: int
    S: int
    window: int = 0
    L: int = 0  # 0: S
    R: int = 1
    H: int = 16
    num_empty: tuple[int, ...] = (0,)  # of each sequence of the batch
    dtype: type = jnp.bfloat16
    common: float = 0  # of what the tangents of all keys have in common, in units of their spread


PROBLEMS = {
    "cache, constant, ragged, grouped queries": Problem(T=70, S=134, window=64, L=70, R=2, num_empty=(10,)),
    "head width 80, full attention, a batch": Problem(T=40, S=60, H=80, num_empty=(0, 20), dtype=jnp.float16),
    "head width 128, keys that no query sees": Problem(T=20, S=150, window=8, L=20, H=128),
    "head width 64, tiles inside the band": Problem(T=64, S=256, window=192, L=64, H=64, num_empty=(3,)),
    "head width 8, one query": Problem(T=1, S=8, window=5, H=8, num_empty=(2,)),
}
IN_EVERY_RUN = [  # every pass once, and each of what makes the cases different
    ("cache, constant, ragged, grouped queries", "forward"),
    ("cache, constant, ragged, grouped queries", "dual"),
    ("cache, constant, ragged, grouped queries", "second_reverse"),
    ("head width 80, full attention, a batch", "tangent"),
    ("head width 80, full attention, a batch", "reverse"),
    ("head width 64, tiles inside the band", "forward"),
    ("head width 128, keys that no query sees", "reverse"),
    ("head width 128, keys that no query sees", "dual"),
    ("head width 128, keys that no query sees", "second_reverse"),
]


def operands(p: Problem, dtype=None) -> dict:
    """Operands of every pass at a random point: numbers exact in the problem's dtype, as `dtype`."""
    random = np.random.default_rng(0)
    B, L = len(p.num_empty), p.L or p.S

    def array(*shape, offset=0):
        exact = (random.normal(size=shape) + offset).astype(p.dtype).astype(np.float64)
        return jnp.asarray(exact, dtype or p.dtype)

    def rows():
        return array(B, 1, p.R, p.T, p.H)

    def statistics():
        return array(B, 1, p.R, p.T).astype(jnp.promote_types(dtype or p.dtype, jnp.float32))

    x = abs(rows()) if p.common else rows(), array(B, 1, p.S, p.H), array(B, 1, p.S, p.H), jnp.asarray(p.num_empty)
    y = rows(), array(B, 1, L, p.H, offset=p.common), array(B, 1, L, p.H)
    bars = rows(), statistics(), rows(), statistics()
    return pass_operands(x, y, bars, p.window)


def run(module, name: str, p: Problem, dtype=None):
    options = {"num_keys": p.S} if "reverse" in name else {}
    return jax.jit(partial(getattr(module, name), window=p.window, **options))(*operands(p, dtype)[name])


@interpreted
@pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(case, name, marks=() if (case, name) in IN_EVERY_RUN else pytest.mark.slow)
        for case in PROBLEMS
        for name in PASSES
    ],
)
def test_every_pass_equals_that_of_xla(case, name):
    """But for where the rounded weights of a sum differ: some units of the dtype's precision."""
    p = PROBLEMS[case]
    for ours, theirs in zip(run(mosaic_gpu, name, p), run(xla, name, p), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 2 * float(jnp.finfo(p.dtype).eps)


@interpreted
@pytest.mark.parametrize("name", [pytest.param("reverse", marks=pytest.mark.slow), "dual", "second_reverse"])
def test_error_is_within_twice_that_of_xla(name):
    """Against float64, where the tangents of a row's scores lie far from 0: in several tiles."""
    p = Problem(T=64, S=128, window=80, H=32, common=10)
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in run(xla, name, p, jnp.float64)]
    for ours, theirs, truth in zip(run(mosaic_gpu, name, p), run(xla, name, p), expected, strict=True):
        assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + 1e-6  # statistics are in float32


@pytest.mark.parametrize(
    "name, num_kernels", [("forward", 1), ("tangent", 1), ("dual", 1), ("reverse", 2), ("second_reverse", 5)]
)
@pytest.mark.parametrize("H", [80, *(pytest.param(H, marks=pytest.mark.slow) for H in (64, 96, 128))])
def test_every_pass_lowers_for_hopper(name, num_kernels, H):
    """On any machine: what the CUDA compiler would be given."""
    num_kernels += name == "dual" and H > mosaic_gpu.MAX_DUAL_WIDTH
    p = Problem(T=256, S=768, window=512, L=256, R=2, H=H)
    options = {"num_keys": p.S} if "reverse" in name else {}
    function = jax.jit(partial(getattr(mosaic_gpu, name), window=p.window, **options))
    arrays = jax.eval_shape(partial(operands, p))[name]
    with jax.sharding.use_abstract_mesh(hopper()):
        lowered = function.trace(*arrays).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu") == num_kernels
    named = [marks.read(path) for path in re.findall(r'loc\("([^"]*_flops[^"]*)"', lowered.as_text(debug_info=True))]
    assert len({kernel for kernel, _ in named}) == num_kernels
    # Each sweep computes its scores anew; a pass takes at least the products of the algebra (docs/kernels.md).
    least = {"forward": 2, "tangent": 3, "dual": 4, "reverse": 5, "second_reverse": 9}[name]
    visible = 2 * p.H * p.R * bands.num_visible(p.T, p.S, p.window)
    assert least * visible <= sum(dict(named).values()) <= 24 * visible


def hopper():
    return AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))


def test_obstacles_are_named():
    def obstacle(dtype, width=64, value_width=0):
        sizes = (8, 0, 1, 1, width, value_width or width, (dtype,), 0)
        return mosaic_gpu.obstacle(problems.Problem("", *sizes, False, "any", False, False))

    assert "Hopper generation, not cpu" in obstacle("bfloat16")
    with jax.sharding.use_abstract_mesh(hopper()):
        assert obstacle("bfloat16") == ""
        assert "bfloat16 or float16" in obstacle("float32")
        assert "up to 128, not 256" in obstacle("float16", 256)
        assert "as wide as queries" in obstacle("float16", 64, 32)


def test_no_jax_that_interprets_them_skips_these_tests():
    assert mosaic_gpu.can_interpret() == (jax.__version_info__ >= (0, 11, 2))
