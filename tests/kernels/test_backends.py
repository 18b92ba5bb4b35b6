"""Who computes it: the choice, its errors, and the fused kernels as far as a CPU can run them. Shapes: see cases.py."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from tests.kernels.cases import Case, for_target, relative_error
from ttt_e2e.config import ATTENTION_BACKENDS
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention import backends, problems, splash


def qkv(case: Case, dtype=jnp.float32):
    x = case.problem(dtype=dtype)
    return x["q"], x["k"], x["v"]


ANYWHERE = {"splash": {"interpret": True}, "cudnn": {"implementation": "xla"}}  # options of `attend_square`


def value_and_gradients(attend, x: dict, **options):
    def loss(x):
        return jnp.sum(jnp.sin(attend(x, **options)))

    return jax.jit(jax.value_and_grad(loss))(x)


@pytest.fixture(params=ANYWHERE)
def fused(request, monkeypatch):
    """The name of a backend that is made to run anywhere: interpreted, or with XLA behind cuDNN's entry point."""
    module = backends.load(request.param)
    monkeypatch.setattr(module, "attend_square", partial(module.attend_square, **ANYWHERE[request.param]))
    monkeypatch.setattr(problems, "obstacle", lambda *_: "")  # float32, so that errors are small
    return request.param


def test_the_configuration_names_every_backend():
    """It is a leaf: it cannot import the registry."""
    assert ("auto", *backends.REGISTRY) == ATTENTION_BACKENDS


FUNCTIONS = {
    "passes": {"forward", "tangent", "dual", "reverse", "second_reverse"},
    "dense": {"attend"},
    "fused": {"attend", "attend_square"},
}


@pytest.mark.parametrize("name", backends.REGISTRY)
def test_every_backend_defines_what_its_form_asks_for(name):
    backend, module = backends.REGISTRY[name], backends.load(name)
    functions = FUNCTIONS[backend.form] | ({"obstacle"} if backend.platform else set())
    functions |= {"can_interpret"} if backend.platform and backend.form == "passes" else set()
    assert functions <= set(dir(module))


@pytest.mark.parametrize("window", [0, 37])
def test_fused_kernels_are_given_the_right_band(fused, window):
    case = Case(T=150, N=4, G=2, H=80, window=window)
    x = case.problem(dtype=jnp.float32)
    expected = value_and_gradients(case.attend, x, backend="reference")
    actual = value_and_gradients(case.attend, x, backend=fused, derivatives="first_order")
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("window", [0, 37])
def test_fused_kernels_serve_queries_with_a_cache(fused, window):
    """None of its keys empty, some, all."""
    case = Case(T=100, C=30, N=4, G=2, H=16, window=window)
    x = case.problem(dtype=jnp.float32)

    @partial(jax.jit, static_argnames=("backend", "derivatives"))
    def results(num_empty, **options):
        return value_and_gradients(case._replace(num_empty=num_empty).attend, x, **options)

    expected = {n: results(n, backend="reference", derivatives="first_order") for n in (0, 10, 30)}
    actual = {n: results(n, backend=fused, derivatives="first_order") for n in expected}
    for n in expected:
        assert relative_error(actual[n], expected[n]) < 1e-5
    assert relative_error(actual[0], expected[10]) > 1e-3  # the bound notices another number of empty keys


def test_splash_attention_lowers_for_tpus():
    case = Case(T=256, N=2, G=1, H=64, window=100)
    lowered = (
        jax.jit(lambda *x: splash.attend_square(*x, window=100)).trace(*qkv(case)).lower(lowering_platforms=("tpu",))
    )
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize(("T", "block"), [(384, 128), (768, 256), (1024, 512)])
def test_splash_attention_is_right_in_blocks_of_every_size(T, block):
    case = Case(T=T, N=1, G=1, H=8, window=0)
    assert splash._block_sizes(T).block_kv_dq == block
    actual = splash.attend_square(*qkv(case), window=0, interpret=True)
    expected = window_attention(*qkv(case), window=0, num_empty=0, backend="reference")
    assert relative_error(actual, expected) < 1e-5
    shifted = window_attention(*qkv(case), window=T - 1, num_empty=0, backend="reference")  # the control
    assert relative_error(actual, shifted) > 1e-5


def test_auto_says_once_what_it_chose(caplog):
    caplog.set_level(logging.INFO)
    problems._log_choice.cache_clear()
    for _ in range(2):
        window_attention(*qkv(Case(T=4)), window=2)
    messages = [record.getMessage() for record in caplog.records if "window_attention" in record.getMessage()]
    assert messages == ["window_attention on cpu: backend xla (derivatives: any)"]


@pytest.mark.parametrize(
    "options",
    [
        {"derivatives": "any"},
        {"derivatives": "reverse_of_tangent"},
        {"derivatives": "first_order", "with_lse": True},
        {"derivatives": "first_order", "num_empty": 3},  # with no cache for them to be in
    ],
    ids=str,
)
def test_fused_kernels_leave_other_callers_to_auto(fused, options):
    q, k, v = qkv(Case(T=4))
    actual = window_attention(q, k, v, window=2, backend=fused, **options)
    expected = window_attention(q, k, v, window=2, backend="xla", **options)
    assert relative_error(actual, expected) == 0


@pytest.mark.parametrize(
    "x, message",
    [
        (Case(T=4).problem(dtype=jnp.int32), "bfloat16, float16, float32, all arrays alike, not int32.*xla"),
        (Case(T=4, H=264).problem(dtype=jnp.float32), "head widths up to 256, not 264.*xla"),
        (Case(T=4).problem(dtype=jnp.float32) | {"cached_k": jnp.zeros((1, 0, 8), jnp.bfloat16)}, "of one dtype.*xla"),
    ],
)
def test_what_the_kernels_for_tpus_cannot_take_is_named(x, message):
    with pytest.raises(UserError, match=message):
        Case(T=4, window=2).attend(x, "pallas_tpu")


def test_kernels_for_tpus_refuse_float64_and_gpus(float64):
    with pytest.raises(UserError, match=r"'pallas_tpu' of window_attention takes .*, not float64: use auto, xla"):
        window_attention(*qkv(Case(T=4), jnp.float64), window=2, backend="pallas_tpu")
    message = "'pallas_tpu' of window_attention is for tpus, not gpus: use auto, xla"
    with for_target("gpu", "NVIDIA H100 80GB HBM3"), pytest.raises(UserError, match=message):
        window_attention(*qkv(Case(T=4)), window=2, backend="pallas_tpu")


@pytest.mark.parametrize(
    "backend, options, message",
    [
        ("cudn", {}, "legal are auto, reference, xla, pallas_tpu, mosaic_gpu, cudnn, splash"),
        ("cudnn", {"derivatives": "first_order"}, "is for gpus, not cpus: use auto, xla"),
        ("splash", {"derivatives": "first_order"}, "is for tpus, not cpus: use auto, xla"),
        ("xla", {"derivatives": "first"}, "legal are any, first_order, reverse_of_tangent"),
    ],
)
def test_unsupported_combinations_name_the_alternatives(backend, options, message):
    with pytest.raises(UserError, match=message):
        window_attention(*qkv(Case(T=4)), window=2, backend=backend, **options)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = qkv(Case(T=4, N=3, G=1))
    with pytest.raises(UserError, match=r"\(3, 4, 8\)"):
        window_attention(q, k[:, :3], v[:, :3], window=2)
    with pytest.raises(UserError, match="or neither"):
        window_attention(q, k, v, window=2, cached_k=k)
    with pytest.raises(UserError, match="as many new keys as queries"):
        window_attention(q[:, 1:], k, v, window=2, cached_k=k, cached_v=v)


def test_cached_keys_are_leading_keys():
    case = Case(T=20, C=10, window=8, num_empty=4)
    x = case.problem(dtype=jnp.float32)
    k, v = (jnp.concatenate([x[f"cached_{name}"], x[name]], axis=1) for name in "kv")
    for backend in ("xla", "reference"):
        joined = window_attention(x["q"], k, v, window=8, num_empty=4, backend=backend)
        assert relative_error(case.attend(x, backend), joined) < 1e-6
