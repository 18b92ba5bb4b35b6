"""The TPU kernels: every pass, interpreted, against XLA's, in several tiles; their lowering. Shapes: see xla.py."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tests.kernels.cases import Case, nestings, relative_error, results, third_derivatives
from ttt_e2e.bench.attention_check import pass_operands
from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention import bands, xla
from ttt_e2e.kernels.attention.tpu import passes as pallas_tpu


class Problem(NamedTuple):
    """Sizes of what the passes are given; the tangents are of the last L keys, gradients of the last `num_keys`."""

    T: int
    S: int
    window: int
    block: int = 8
    L: int = 0  # 0: S
    num_keys: int = 0  # likewise
    G: int = 2
    R: int = 1
    H: int = 8
    value_width: int = 8
    num_empty: int = 0


PROBLEMS = {
    "cache, constant": Problem(T=16, S=40, window=24, L=16, num_keys=16, R=2, num_empty=5),
    "cache, its gradient wanted, ragged": Problem(T=13, S=33, window=20, L=13, num_keys=33, num_empty=12),
    "cache, its tangent given, its gradient not wanted": Problem(T=16, S=32, window=12, L=32, num_keys=16),
    "full attention, ragged": Problem(T=21, S=30, window=0, R=3, G=1, num_empty=9),
    "window larger than all keys": Problem(T=20, S=20, window=100),
    "keys that no query sees": Problem(T=4, S=60, window=6, L=60, num_keys=60),
    "keys that no query sees, constant": Problem(T=9, S=60, window=18, L=9, num_keys=60, num_empty=50),
    "window of one": Problem(T=20, S=24, window=1),
    "one query": Problem(T=1, S=8, window=5, num_empty=2),
    "head width 80, values of another": Problem(T=24, S=40, window=16, H=80, value_width=24, R=2),
    "head width 128, block of 128": Problem(T=130, S=150, window=40, block=0, H=128, value_width=128, G=1),
    "one tile": Problem(T=5, S=5, window=3),
    "head width 64": Problem(T=24, S=24, window=12, H=64, value_width=64, G=1),
}
IN_EVERY_RUN = (  # the others repeat what these cover, at other sizes
    "cache, constant",
    "cache, its gradient wanted, ragged",
    "full attention, ragged",
    "keys that no query sees",
    "head width 80, values of another",
)


def operands(p: Problem, dtype, batch=()) -> dict:
    """Operands of every pass at a random point, batched over leading axes of sizes `batch`, `num_empty` too."""
    random = np.random.default_rng(0)
    lead, L = (*batch, p.G), p.L or p.S

    def rows(width):
        return jnp.asarray(random.normal(size=(*lead, p.R, p.T, width)), dtype)

    def keys(length, width):
        return jnp.asarray(random.normal(size=(*lead, length, width)), dtype)

    def statistics():
        return rows(1)[..., 0].astype(jnp.float32)

    num_empty = jnp.full(batch, p.num_empty, jnp.int32)
    if batch:
        num_empty -= jnp.arange(batch[-1]) % (p.num_empty + 1)
    x = rows(p.H), keys(p.S, p.H), keys(p.S, p.value_width), num_empty
    y = rows(p.H), keys(L, p.H), keys(L, p.value_width)
    bars = rows(p.value_width), statistics(), rows(p.value_width), statistics()
    of_passes = pass_operands(x, y, bars, p.window)
    of_tangent = of_passes["second_reverse"][: -len(bars[2:])]  # without cotangents of the output itself
    return of_passes | {"second_reverse": of_tangent, "second_reverse of all": of_passes["second_reverse"]}


def passes(kernels, p: Problem, arrays: dict, **options) -> dict:
    """The results of every pass."""
    gradients = {"num_keys": p.num_keys or p.S}
    functions = {
        "forward": kernels.forward,
        "tangent": kernels.tangent,
        "dual": kernels.dual,
        "reverse": partial(kernels.reverse, **gradients),
        "second_reverse": partial(kernels.second_reverse, **gradients),
        "second_reverse of all": partial(kernels.second_reverse, **gradients),
    }
    return {name: function(*arrays[name], window=p.window, **options) for name, function in functions.items()}


def compare(p: Problem, dtype=jnp.float32, bound=1e-5, batch=()):
    """Both backends, pass by pass; the bound is for float32 and sums of some hundred terms."""
    arrays = jax.jit(lambda: operands(p, dtype, batch))()
    actual = jax.jit(lambda: passes(pallas_tpu, p, arrays, block=p.block))()
    expected = jax.jit(lambda: passes(xla, p, arrays))()
    for name in expected:
        for a, b in zip(actual[name], expected[name], strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            # Not relative where there is nothing: a window of one has gradients of 0.
            assert relative_error(a, b) <= bound or abs(a - b).max() <= bound * 10, name


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(problem, id=name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow])
        for name, problem in PROBLEMS.items()
    ],
)
def test_every_pass_equals_xlas(problem):
    compare(problem)


@pytest.mark.parametrize(
    "dtype, bound", [(jnp.bfloat16, 2e-2), pytest.param(jnp.float16, 3e-3, marks=pytest.mark.slow)]
)
def test_every_pass_in_half_precision(dtype, bound):
    """Within a few roundings of the other's; which of the two is nearer to the truth, test_precision.py tells."""
    compare(PROBLEMS["cache, constant"], dtype, bound)


@pytest.mark.slow
def test_leading_axes_and_their_numbers_of_empty_keys_become_the_grid():
    compare(Problem(T=16, S=40, window=24, num_empty=20), batch=(2, 3))


def test_empty_keys_have_no_influence_whatever_they_hold():
    x = Case(T=16, C=20, H=8).problem(dtype=jnp.bfloat16)

    def gradients(filling):
        cached = {name: x[name].at[:, :13].set(filling) for name in ("cached_k", "cached_v")}

        def loss(z):
            case = Case(T=16, C=20, H=8, window=30, num_empty=13)
            return jnp.sum(case.attend(z | cached, "pallas_tpu").astype(jnp.float32) ** 2)

        return jax.grad(loss)({name: x[name] for name in "qkv"})

    for a, b in zip(*(jax.tree.leaves(jax.jit(gradients)(filling)) for filling in (0.0, 1e9)), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))


def test_a_row_that_sees_nothing_is_finite():
    p = Problem(T=16, S=24, window=24, num_empty=20)  # more than are cached
    x = operands(p, jnp.float32)["forward"]
    for leaf in jax.jit(lambda: pallas_tpu.forward(*x, window=p.window, block=8))():
        assert np.isfinite(leaf).all()


# ------------------------------------------------------------------------------------------ through the operation


@pytest.mark.parametrize("mapped", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["vmap", "one"])
def test_nestings_equal_dense_autodiff(mapped):
    """`num_empty` is traced."""
    case = Case(T=12, C=9, N=4, G=2, H=5, window=4, num_empty=3)
    x, y = case.problem(0, jnp.float32), case.problem(1, jnp.float32)
    bar = np.random.default_rng(2).normal(size=(case.N, case.T, case.H)).astype(np.float32)
    names = ["vjp_of_jvp", "inner_jvp"] if mapped else ["jvp", "vjp_of_vjp", "inner_vjp"]

    def derivatives(backend):
        def attend(x):
            def one(x, num_empty):
                return case._replace(num_empty=num_empty).attend(x, backend)

            if not mapped:
                return one(x, jnp.asarray(case.num_empty))
            batch = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), x)
            return jax.vmap(one)(batch, jnp.asarray([case.num_empty, 0]))

        every = nestings(attend, x, y, bar)
        return results({name: every[name] for name in names})

    actual, expected = derivatives("pallas_tpu"), derivatives("reference")
    errors = {name: relative_error(actual[name], expected[name]) for name in names}
    assert max(errors.values()) <= 2e-5, errors  # float32, sums of squares of gradients


def test_fused_passes_equal_dense_autodiff():
    case = Case(T=12, C=9, N=4, G=2, H=5, window=4, num_empty=3)
    x, y = case.problem(0, jnp.float32), case.problem(1, jnp.float32)
    new = {name: x[name] for name in "qkv"}, {name: y[name] for name in "qkv"}

    def outputs_and_gradients(backend, **options):
        def outputs(x, y):
            def attend(z):
                return case.attend(x | z, backend, with_lse=True, **options)

            return jax.jvp(attend, ({n: x[n] for n in new[0]},), (y,))

        out, pull_back = jax.vjp(outputs, x, new[1])
        return out, pull_back(jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), out))

    fused = jax.jit(lambda: outputs_and_gradients("pallas_tpu", derivatives="reverse_of_tangent"))()
    assert relative_error(fused, jax.jit(lambda: outputs_and_gradients("reference"))()) <= 2e-5


@pytest.mark.slow
def test_third_derivatives_go_by_xla():
    case = Case(T=12, C=9, N=2, G=1, H=4, window=4)
    x, y = case.problem(0, jnp.float32), case.problem(1, jnp.float32)
    actual, expected = (
        results(third_derivatives(lambda x, backend=backend: case.attend(x, backend), x, y, 1.0))
        for backend in ("pallas_tpu", "reference")
    )
    assert relative_error(actual, expected) <= 1e-4  # float32, sums of products of gradients


# ------------------------------------------------------------------------------------------ the grid, and lowering


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(
    "T, S, window, block", [(40, 40, 9, 8), (40, 75, 24, 8), (17, 90, 90, 16), (100, 130, 1, 8), (5, 64, 10, 8)]
)
def test_programs_are_the_tiles_of_the_band(T, S, window, block, by_column):
    """Every tile with a visible score, once, a row's or column's together, and few others."""
    tiles = bands.Tiles(T, S, window, block)
    query, key = np.mgrid[:T, :S]
    visible = (key <= query + S - T) & (key > query + S - T - window)
    query, key = (query - T) // block + tiles.query_blocks, (key - S) // block + tiles.key_blocks
    needed = set(zip(query[visible].tolist(), key[visible].tolist()))
    visited = list(map(tuple, tiles.visit(tiles.key_blocks, by_column).T.tolist()))
    assert len(set(visited)) == len(visited) and needed <= set(visited)
    assert visited == sorted(visited, key=lambda tile: tile[::-1] if by_column else tile)
    assert len(visited) - len(needed) <= 2 * (tiles.query_blocks + tiles.key_blocks)
    for row in range(tiles.query_blocks):
        columns = [column for r, column in visited if r == row]
        assert (columns[0], columns[-1]) == tuple(map(int, tiles.columns(row)))
    for column in range(tiles.key_blocks):
        rows = [row for row, c in visited if c == column]
        assert (rows[0], rows[-1]) == tuple(map(int, tiles.rows(column)))


def test_the_grid_grows_linearly_with_the_sequence():
    short, long = (len(pallas_tpu.plan(T, T, 512).visit(10**6, False)[0]) for T in (8192, 32768))
    assert long <= 4.1 * short


@pytest.mark.parametrize("H", [64, 80, 128])
@pytest.mark.parametrize("device", ["TPU v5", "TPU v6 lite"])
def test_every_pass_lowers_for_tpus(device, H):
    p = Problem(T=256, S=512, window=512, block=128, L=256, H=H, value_width=H, num_empty=5)
    arrays = jax.eval_shape(lambda: operands(p, jnp.bfloat16))
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice(device, None, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(lambda arrays: passes(pallas_tpu, p, arrays, block=p.block)).trace(arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 9  # one kernel for forward, tangent and dual each, two for each reverse
    assert "stablehlo.while" not in text  # nothing is interpreted


def test_the_platform_is_chosen_when_the_operation_is_lowered():
    x = Case(T=16, H=64).problem(dtype=jnp.bfloat16)
    attend = jax.jit(lambda q, k, v: window_attention(q, k, v, window=8, backend="pallas_tpu"))
    traced = attend.trace(x["q"], x["k"], x["v"])
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
