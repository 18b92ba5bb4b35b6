"""Derivatives of window attention against dense autodiff. Shapes: see cases.py."""

from functools import partial

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.kernels.cases import Case, nestings, relative_error, results, third_derivatives

ALL_NESTINGS = {
    "cache, one block": Case(T=12, C=9, N=4, G=2, H=5, window=4, num_empty=3),
    "cache, several blocks, ragged": Case(T=70, C=64, N=2, G=2, H=8, window=64, num_empty=10),
    "full attention": Case(T=40, C=30, N=1, G=1, H=4, window=0, num_empty=3),
}
SECOND_ORDER = {
    "more new keys than a block is given": Case(T=100, C=20, N=2, G=1, H=4, window=20),
    "whole sequence, ramp": Case(T=130, N=2, G=1, H=16, window=70),
    "k > S, head width 80": Case(T=30, C=10, N=3, G=3, H=80, window=100),
    "head width 128": Case(T=20, C=20, N=1, G=1, H=128, window=8),
    "one query": Case(T=1, C=7, N=2, G=1, H=8, window=5, num_empty=2),
}


def some_slow(cases: dict[str, Case], *, but: str):
    """Parameters of a test: all cases, of which all but one are slow."""
    return [pytest.param(case, id=name, marks=() if name == but else pytest.mark.slow) for name, case in cases.items()]


def compare(case: Case, make=nestings, bound=1e-12):
    """`make`'s derivatives by both backends. The bound is for float64: sums of some hundred terms."""
    with jax.enable_x64(True):
        x, y = case.problem(0), case.problem(1)
        bar = np.random.default_rng(2).normal(size=(case.N, case.T, case.H))
        actual = results(make(lambda x: case.attend(x), x, y, bar))
        expected = results(make(lambda x: case.attend(x, "reference"), x, y, bar))
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) <= bound, errors


def some(*names):
    def make(*problem):
        every = nestings(*problem)
        return {name: every[name] for name in names}

    return make


@pytest.mark.parametrize("case", some_slow(ALL_NESTINGS, but="cache, several blocks, ragged"))
def test_every_nesting_equals_dense_autodiff(case):
    compare(case)


@pytest.mark.parametrize("case", SECOND_ORDER.values(), ids=SECOND_ORDER)
def test_the_inner_loops_nestings_equal_dense_autodiff(case):
    compare(case, some("inner_vjp", "inner_jvp"))


@pytest.mark.parametrize("is_recorded", [False, True], ids=["computed", "recorded"])
@pytest.mark.parametrize("moving", [("q", "k", "v"), ("q", "k", "v", "cached_k", "cached_v")], ids=["new", "all"])
@pytest.mark.parametrize("case", [*ALL_NESTINGS.values(), SECOND_ORDER["whole sequence, ramp"]])
def test_reverse_of_tangent_in_fewer_products_equals_dense_autodiff(case, moving, is_recorded):
    """Fused, with every cotangent; output and lse may be recorded by an earlier call."""

    def outputs(x, y, **options):
        def attend(z):
            return case.attend(x | z, with_lse=True, **options)

        return jax.jvp(attend, ({name: x[name] for name in moving},), ({name: y[name] for name in moving},))

    def outputs_and_gradients(**options):
        out, pull_back = jax.vjp(partial(outputs, **options), x, y)
        random = np.random.default_rng(2)
        return out, pull_back(jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape)), out))

    with jax.enable_x64(True):
        x, y = case.problem(0), case.problem(1)
        recorded = case.attend(x, with_lse=True) if is_recorded else None
        fused = jax.jit(lambda: outputs_and_gradients(derivatives="reverse_of_tangent", recorded=recorded))()
        assert relative_error(fused, jax.jit(lambda: outputs_and_gradients(backend="reference"))()) <= 1e-12


def test_third_derivatives_equal_dense_autodiff():
    compare(Case(T=40, C=10, N=2, G=1, H=4, window=18), third_derivatives)


def test_window_of_one_copies_values_and_has_no_gradient_elsewhere(float64):
    case = Case(T=20, C=5, window=1)
    x, y = case.problem(0), case.problem(1)
    out, out_dot = jax.jvp(case.attend, (x,), (y,))
    np.testing.assert_allclose(out, jnp.repeat(x["v"], 2, axis=0), rtol=1e-12)
    np.testing.assert_allclose(out_dot, jnp.repeat(y["v"], 2, axis=0), rtol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(case.attend(x) ** 2))(x)
    np.testing.assert_allclose(gradient["v"], 4 * x["v"], rtol=1e-12)
    assert max(abs(gradient[name]).max() for name in ("q", "k")) < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_every_nesting_of_random_problems(seed):
    random = np.random.default_rng(seed)
    C, G = int(random.integers(0, 100)), int(random.choice([1, 2]))
    case = Case(
        T=int(random.integers(1, 160)),
        C=C,
        N=G * int(random.integers(1, 4)),
        G=G,
        H=int(random.choice([4, 16, 20, 64, 80, 128])),
        window=int(random.choice([0, 2, 5, 30, 64, 100, 300])),
        num_empty=int(random.integers(0, C + 1)),
    )
    compare(case)


@hypothesis.settings(max_examples=5)
@hypothesis.given(
    T=st.integers(1, 70), C=st.integers(0, 40), window=st.integers(0, 80), G=st.integers(1, 2), R=st.integers(1, 3)
)
def test_generated_shapes(T, C, window, G, R):
    """The gradient and a second derivative. (Window 1 has gradients of 0, which have no relative error.)"""
    hypothesis.assume(window != 1 and T + C > 1)
    case = Case(T, C, G * R, G, 4, window)
    compare(case, some("vjp", "vjp_of_jvp"))


@pytest.mark.parametrize("moving", ["q", "k", "v", "cached_k", "cached_v"])
def test_derivatives_in_one_operand_alone(moving):
    """The tangents of the others are zeros that JAX knows of. (Float32: XLA treats its products differently.)"""
    case = Case(T=40, C=20, N=1, G=1, H=4, window=0)
    x, y = case.problem(0, jnp.float32), case.problem(1, jnp.float32)

    def nested(backend):
        def loss(z):
            return jnp.sum(jnp.sin(case.attend(x | {moving: z}, backend)))

        def along(function):
            return lambda z: jax.jvp(function, (z,), (y[moving],))[1]

        z = x[moving]
        vjp_of_vjp = jax.grad(lambda z: jnp.sum(jax.grad(loss)(z) ** 2))
        return jax.jit(lambda: (along(along(loss))(z), jax.grad(along(loss))(z), vjp_of_vjp(z)))()

    assert relative_error(nested("xla"), nested("reference")) < 1e-4


# ------------------------------------------------------------------------------------ inside of other transformations


@pytest.fixture(scope="module")
def batch():
    """A case, a batch of eight of its problems, and the gradient of a squared gradient for each of them."""
    case = Case(T=40, C=12, N=2, G=1, H=4, window=12)
    x = jax.tree.map(lambda *a: jnp.stack(a), *[case.problem(seed, jnp.float32) for seed in range(8)])
    return case, x, jax.jit(jax.vmap(lambda x: second_gradient(lambda x: case.attend(x, "reference"))(x)))(x)


def second_gradient(attend):
    def squared(x):
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x))))(x)))

    return jax.grad(squared)


def by_scan(function):
    return lambda x: jax.lax.scan(lambda carry, x: (carry, function(x)), 0.0, x)[1]


TRANSFORMED = {
    "vmap": lambda case: jax.vmap(second_gradient(case.attend)),
    "vmap of another axis": lambda case: (
        lambda x: jax.vmap(second_gradient(case.attend), 1)(jax.tree.map(lambda a: a.swapaxes(0, 1), x))
    ),
    "vmap inside": lambda case: second_gradient(jax.vmap(case.attend)),
    "two vmaps": lambda case: (
        lambda x: jax.tree.map(
            lambda a: a.reshape(8, *a.shape[2:]),
            jax.vmap(jax.vmap(second_gradient(case.attend)))(jax.tree.map(lambda a: a.reshape(2, 4, *a.shape[1:]), x)),
        )
    ),
    "scan": lambda case: by_scan(second_gradient(case.attend)),
    "scan inside": lambda case: second_gradient(by_scan(case.attend)),
    "remat": lambda case: jax.vmap(second_gradient(jax.checkpoint(case.attend))),
    "remat and scan inside": lambda case: second_gradient(by_scan(jax.checkpoint(case.attend))),
    "shard_map": lambda case: jax.shard_map(
        jax.vmap(second_gradient(case.attend)), mesh=mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False
    ),
}


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=TRANSFORMED)
def test_second_derivatives_inside_of_other_transformations(batch, transformed):
    case, x, expected = batch
    assert relative_error(jax.jit(transformed(case))(x), expected) < 1e-5  # float32


def test_without_jit(batch):
    case, x, expected = batch
    first = jax.tree.map(lambda a: a[0], (x, expected))
    assert relative_error(second_gradient(case.attend)(first[0]), first[1]) < 1e-5


def test_number_of_empty_keys_may_be_mapped(batch):
    case, x, _ = batch
    num_empty = jnp.arange(8)
    actual = jax.vmap(lambda x, n: second_gradient(case._replace(num_empty=n).attend)(x))(x, num_empty)
    for i in (0, 7):
        one = jax.tree.map(lambda a, i=i: a[i], x)
        expected = second_gradient(lambda x, i=i: case._replace(num_empty=i).attend(x, "reference"))(one)
        assert relative_error(jax.tree.map(lambda a, i=i: a[i], actual), expected) < 1e-5


def test_batch_and_heads_are_divided_among_devices_without_communication():
    case = Case(T=20, C=12, N=4, G=2, H=4, window=12)
    two_axes = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = jax.tree.map(lambda *a: jnp.stack(a), *[case.problem(seed, jnp.float32) for seed in range(4)])
    expected = jax.jit(jax.vmap(second_gradient(lambda x: case.attend(x, "reference"))))(x)
    x = jax.device_put(x, jax.NamedSharding(two_axes, P("data", "model")))
    compiled = jax.jit(jax.vmap(second_gradient(case.attend))).lower(x).compile()
    assert relative_error(compiled(x), expected) < 1e-5
    text = compiled.as_text()
    assert not [name for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all") if name in text]
