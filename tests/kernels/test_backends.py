"""Who computes it: the choice, its errors, and the fused kernels as far as a CPU can run them. Shapes: see cases.py."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from tests.kernels.cases import Case, relative_error
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import cudnn, first_order, splash, window_attention
from ttt_e2e.kernels.window_attention import FASTER, Faster, _log_choice


def qkv(case: Case, dtype=jnp.float32):
    x = case.problem(dtype=dtype)
    return x["q"], x["k"], x["v"]


FUSED = {"splash": partial(splash.attend, interpret=True), "cudnn": partial(cudnn.attend, implementation="xla")}


def value_and_gradients(attend, x: dict, **options):
    def loss(x):
        return jnp.sum(jnp.sin(attend(x, **options)))

    return jax.jit(jax.value_and_grad(loss))(x)


@pytest.fixture(params=FUSED)
def fused(request, monkeypatch):
    """The name of a backend that is made to run anywhere: interpreted, or with XLA behind cuDNN's entry point."""
    monkeypatch.setitem(first_order.BACKENDS, request.param, FUSED[request.param])
    monkeypatch.setattr(first_order, "obstacle", lambda *_: "")  # float32, so that errors are small
    return request.param


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
    lowered = jax.jit(lambda *x: splash.attend(*x, window=100)).trace(*qkv(case)).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_auto_says_once_what_it_chose(caplog):
    caplog.set_level(logging.INFO)
    _log_choice.cache_clear()
    for _ in range(2):
        window_attention(*qkv(Case(T=4)), window=2)
    messages = [record.getMessage() for record in caplog.records if "window_attention" in record.getMessage()]
    assert messages == ["window_attention on cpu: backend xla"]


@pytest.fixture
def faster(monkeypatch, caplog):
    """As if the kernels for TPUs were faster on CPUs, for some; and as if there were one device."""
    measured = Faster("pallas_tpu", derivatives=("any",), head_widths=(16, 64), min_window=8)
    monkeypatch.setitem(FASTER, jax.devices()[0].device_kind, (measured,))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    caplog.set_level(logging.INFO)
    _log_choice.cache_clear()


@pytest.mark.parametrize(
    "width, window, cached, derivatives, chosen",
    [
        (16, 8, 0, "any", "pallas_tpu"),
        (16, 0, 0, "any", "pallas_tpu"),  # full attention: 12 keys
        (16, 9, 4, "reverse_of_tangent", "xla"),
        (16, 7, 0, "any", "xla"),
        (8, 8, 0, "any", "xla"),
        (16, 20, 4, "first_order", "xla"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(faster, caplog, width, window, cached, derivatives, chosen):
    case = Case(T=12, C=cached, H=width, window=window)
    attend = jax.jit(lambda x: case.attend(x, "auto", derivatives=derivatives))
    jax.eval_shape(attend, case.problem(dtype=jnp.float32))
    assert [r.getMessage() for r in caplog.records][-1] == f"window_attention on cpu: backend {chosen}"


def test_auto_takes_no_kernel_that_cannot_do_it(faster, caplog, float64):
    window_attention(*qkv(Case(T=12, H=16), jnp.float64), window=0)
    assert caplog.records[-1].getMessage() == "window_attention on cpu: backend xla"


def test_auto_takes_no_kernel_where_arrays_may_be_divided_among_devices(faster, caplog, monkeypatch):
    """XLA cannot divide it: lowering would fail. Inside of shard_map nothing is divided."""
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    x = [jnp.stack([a] * 8) for a in qkv(Case(T=12, H=16))]

    def attend(*x):
        return jax.vmap(lambda *x: window_attention(*x, window=0))(*x)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    manual = jax.shard_map(attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    jax.eval_shape(attend, *x)
    jax.eval_shape(manual, *x)
    chosen = [r.getMessage().split()[-1] for r in caplog.records if "window_attention" in r.getMessage()]
    assert chosen == ["xla", "pallas_tpu"]


def for_target(platform: str, kind: str, axis_type=AxisType.Manual):
    """A context in which programs are traced for another accelerator."""
    device = AbstractDevice(kind, None, platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((8,), ("data",), (axis_type,), abstract_device=device))


H100, TPU = ("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5")


@pytest.mark.parametrize(
    "target, case, chosen",
    [
        (H100, Case(T=128, H=64), "gpu: backend cudnn (first order)"),
        (H100, Case(T=128, C=128, H=64, num_empty=9), "gpu: backend cudnn (first order)"),
        (H100, Case(T=128, C=129, H=64), "gpu: backend xla"),  # most of cuDNN's work would be wasted
        (TPU, Case(T=128, H=64), "tpu: backend splash (first order)"),
    ],
)
def test_auto_takes_fused_kernels_where_a_device_has_arrays_of_its_own(target, case, chosen, monkeypatch, caplog):
    monkeypatch.setitem(first_order.BACKENDS, "cudnn", FUSED["cudnn"])  # the true one looks for a GPU when it is traced
    caplog.set_level(logging.INFO)
    _log_choice.cache_clear()
    x = case.problem(dtype=jnp.bfloat16)
    with for_target(*target):
        jax.eval_shape(lambda x: case.attend(x, "auto", derivatives="first_order"), x)
    assert caplog.records[-1].getMessage() == f"window_attention on {chosen}"


@pytest.mark.parametrize(
    "x, message",
    [
        (Case(T=4).problem(dtype=jnp.int32), "bfloat16, float16, float32, all arrays alike, not int32.*xla"),
        (Case(T=4, H=264).problem(dtype=jnp.float32), "head widths up to 256, not 264.*xla"),
        (Case(T=4).problem(dtype=jnp.float32) | {"cached_k": jnp.zeros((0, 1, 8), jnp.bfloat16)}, "of one dtype.*xla"),
    ],
)
def test_what_the_kernels_for_tpus_cannot_take_is_named(x, message):
    with pytest.raises(UserError, match=message):
        Case(T=4, window=2).attend(x, "pallas_tpu")


def test_kernels_for_tpus_refuse_float64_and_gpus(float64):
    with pytest.raises(UserError, match=r"'pallas_tpu' of window_attention takes .*, not float64: use auto, xla"):
        window_attention(*qkv(Case(T=4), jnp.float64), window=2, backend="pallas_tpu")
    message = "'pallas_tpu' of window_attention is for tpus, not gpus: use auto, xla"
    with for_target(*H100), pytest.raises(UserError, match=message):
        window_attention(*qkv(Case(T=4)), window=2, backend="pallas_tpu")


@pytest.mark.parametrize(
    "backend, options, message",
    [
        ("cudn", {}, "legal are auto, reference, xla, pallas_tpu, mosaic_gpu, cudnn, splash"),
        ("cudnn", {}, "derivatives='first_order'.*xla"),
        ("splash", {"derivatives": "first_order", "num_empty": 3}, "only among those before the queries.*xla"),
        ("cudnn", {"derivatives": "first_order"}, "bfloat16 or float16.*xla"),
        ("cudnn", {"derivatives": "first_order", "with_lse": True}, "neither returns lse.*xla"),
        ("xla", {"derivatives": "first"}, "legal are any, first_order, reverse_of_tangent"),
    ],
)
def test_unsupported_combinations_name_the_alternatives(backend, options, message):
    with pytest.raises(UserError, match=message):
        window_attention(*qkv(Case(T=4)), window=2, backend=backend, **options)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = qkv(Case(T=4, N=3, G=1))
    with pytest.raises(UserError, match=r"\(4, 3, 8\)"):
        window_attention(q, k[:3], v[:3], window=2)
    with pytest.raises(UserError, match="or neither"):
        window_attention(q, k, v, window=2, cached_k=k)
    with pytest.raises(UserError, match="as many new keys as queries"):
        window_attention(q[1:], k, v, window=2, cached_k=k, cached_v=v)


def test_cached_keys_are_leading_keys():
    case = Case(T=20, C=10, window=8, num_empty=4)
    x = case.problem(dtype=jnp.float32)
    k, v = (jnp.concatenate([x[f"cached_{name}"], x[name]]) for name in "kv")
    for backend in ("xla", "reference"):
        joined = window_attention(x["q"], k, v, window=8, num_empty=4, backend=backend)
        assert relative_error(case.attend(x, backend), joined) < 1e-6
