"""What `auto` takes: trials of made-up candidates, the file of verdicts, and what is expected of absent devices."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from tests.kernels.cases import Case, for_target
from ttt_e2e.config import ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.kernels import window_attention
from ttt_e2e.kernels.attention import choice, problems

DENSE = partial(window_attention, backend="reference")
CASE = Case(T=12, C=6, N=2, G=1, H=8, window=5, num_empty=1)
H100, TPU = ("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5")


def wrong(*x, **options):
    """A window of one position too few."""
    return DENSE(*x, **options | {"window": options["window"] - 1})


def wrong_gradient(q, k, v, **options):
    return DENSE(q, jax.lax.stop_gradient(k), v, **options)


def raises(*x, **options):
    raise NotImplementedError("spills\nof many lines")


def slow(q, *x, **options):
    """Waits whenever it runs."""

    def wait(a):
        time.sleep(0.05)
        return a

    @jax.custom_jvp
    def delayed(q):
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(q.shape, q.dtype), q)

    delayed.defjvp(lambda q, q_dot: (delayed(*q), *q_dot))
    return DENSE(delayed(q), *x, **options)


MADE_UP = {"wrong": wrong, "wrong_gradient": wrong_gradient, "raises": raises, "slow": slow, "good": DENSE}


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch):
    monkeypatch.setattr(problems, "measured", {})


def trace(derivatives="first_order", case=CASE):
    """Traces one call of attention."""
    x = case.problem(dtype=jnp.bfloat16)
    jax.eval_shape(lambda x: case.attend(x, "auto", derivatives=derivatives), x)


@pytest.mark.parametrize("derivatives", ["first_order", "reverse_of_tangent"])
def test_takes_the_fastest_of_those_that_are_right(derivatives, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    verdicts = choice.measure(partial(trace, derivatives), MADE_UP, tmp_path / "verdicts.json")
    assert list(verdicts.values()) == ["good"]
    [problem] = verdicts
    assert (problem.derivatives, problem.num_cached, problem.may_be_empty) == (derivatives, 6, True)
    [line] = [r.getMessage() for r in caplog.records if "takes" in r.getMessage()]
    assert "takes good (wrong wrong (its error is " in line and "raises failed (NotImplementedError: spills)" in line
    assert "wrong_gradient wrong (" in line and "slow " in line and "good " in line and line.count(" ms") == 2


def test_nothing_right_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no backend works here: raises failed .*, wrong wrong"):
        choice.measure(trace, {"raises": raises, "wrong": wrong}, tmp_path / "verdicts.json")


def test_the_verdict_is_what_is_traced(tmp_path):
    """Also where the same function was traced before, and JAX remembers that."""
    x = CASE.problem(dtype=jnp.float32)
    step = jax.jit(lambda x: CASE.attend(x, "auto"))

    def backend():
        [call] = [e for e in step.trace(x).jaxpr.eqns if "window_attention" in str(e.primitive)]
        return call.params["backend"]

    assert backend() == "xla"
    candidates = {"wrong": wrong, "pallas_tpu": DENSE}
    assert list(choice.measure(partial(jax.eval_shape, step, x), candidates, tmp_path / "v").values()) == ["pallas_tpu"]
    assert backend() == "pallas_tpu"


def test_recorded_output_and_lse_are_given_to_candidates(tmp_path):
    x = CASE.problem(dtype=jnp.bfloat16)

    def trace():
        recorded = (jnp.zeros((2, 12, 8), jnp.bfloat16), jnp.zeros((2, 12)))
        jax.eval_shape(lambda x: CASE.attend(x, "auto", derivatives="reverse_of_tangent", recorded=recorded), x)
        jax.eval_shape(lambda x: CASE.attend(x, "auto", derivatives="first_order", with_lse=True), x)

    calls = []

    def good(*x, **options):
        calls.append((options.get("recorded") is not None, options["with_lse"]))
        return DENSE(*x, **options)

    verdicts = choice.measure(trace, {"good": good, "raises": raises}, tmp_path / "verdicts.json")
    assert list(verdicts.values()) == ["good", "good"]
    assert {(True, False), (False, True)} <= set(calls)


def test_on_cpus_nothing_is_traced_or_timed():
    assert choice.measure(lambda: pytest.fail("traced")) == {}


# ---- the file


def never(*x, **options):
    raise AssertionError("measured again")


def test_a_verdict_is_stored(tmp_path, monkeypatch):
    file = tmp_path / "new" / "verdicts.json"
    assert list(choice.measure(trace, {"wrong": wrong, "good": DENSE}, file).values()) == ["good"]
    monkeypatch.setattr(problems, "measured", {})  # as in another process
    assert list(choice.measure(trace, {"wrong": never, "good": never}, file).values()) == ["good"]
    other = CASE._replace(window=4)
    assert list(choice.measure(partial(trace, case=other), {"slow": slow, "wrong": wrong}, file).values()) == ["slow"]
    assert len(json.loads(file.read_text())["verdicts"]) == 2
    assert [path.name for path in file.parent.iterdir()] == ["verdicts.json"]


@pytest.fixture(scope="module")
def stored_verdict(tmp_path_factory):
    """The content of a file: that "raises" is the best, which it is not."""
    with problems.noting() as noted:
        trace()
    [problem] = noted
    return {"versions": choice._versions(), "verdicts": {choice._key(problem): "raises"}}


DAMAGES = {
    "nothing": json.dumps,
    "no JSON": lambda content: "{",
    "another thing": lambda content: "[1, 2]",
    "no text": lambda content: b"\xff\xfe",
    "another version": lambda content: json.dumps(content | {"versions": content["versions"] | {"jax": "0.1"}}),
    "other kernels": lambda content: json.dumps(content | {"versions": content["versions"] | {"kernels": "x"}}),
    "no such backend": lambda content: json.dumps(content | {"verdicts": dict.fromkeys(content["verdicts"], "bad")}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_cannot_be_used_is_written_anew(damage, stored_verdict, tmp_path, caplog):
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps(stored_verdict))
    good = json.loads(file.read_text())
    damaged = damage(good)
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    verdict = "raises" if damage is json.dumps else "good"
    assert list(choice.measure(trace, {"raises": raises, "good": DENSE}, file).values()) == [verdict]
    assert json.loads(file.read_text()) == good | {"verdicts": dict.fromkeys(good["verdicts"], verdict)}
    assert ("written anew" in caplog.text) == (damage not in (json.dumps, DAMAGES["no such backend"]))


def test_a_file_that_cannot_be_written_is_said_and_no_more(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    candidates = {"raises": raises, "good": DENSE}
    assert list(choice.measure(trace, candidates, tmp_path / "file" / "verdicts.json").values()) == ["good"]
    assert "cannot be written" in caplog.text


def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choice.default_file() == tmp_path / "ttt_e2e" / "attention.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.default_file() == tmp_path / ".cache" / "ttt_e2e" / "attention.json"


# ---- processes

EACH_ITS_OWN = """
import sys
from functools import partial
from pathlib import Path
import jax
from tests.kernels.test_choice import DENSE, raises, trace
from ttt_e2e.kernels.attention import choice
address, process, file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(address, num_processes=2, process_id=process)
candidates = {"xla": raises, "reference": DENSE} if process == 0 else {"xla": DENSE, "reference": raises}
print(*choice.measure(partial(trace, "first_order"), candidates, file / str(process)).values())
"""


def test_two_processes_take_what_the_first_found(tmp_path):
    """Left to themselves, they would not agree."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_NUM_CPU_DEVICES": "1"}
    environment |= {"XLA_FLAGS": "", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EACH_ITS_OWN, address, str(i), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [out.split()[-1:] for out, _ in outputs] == [["reference"], ["reference"]], outputs
    assert [path.name for path in tmp_path.iterdir()] == ["0"]  # the other one has measured nothing


# ---- devices that are not here


def chosen(target, derivatives, axis_type=AxisType.Manual, dtypes=("bfloat16",), T=128, K=0, may_be_empty=False):
    calls = (may_be_empty, derivatives, False, False)
    with for_target(*target, axis_type):
        return problems.choose(problems.Problem(target[1], T, K, 4, 2, 64, 64, dtypes, 64, *calls))


@pytest.mark.parametrize(
    "target, derivatives, options, backend",
    [
        (H100, "first_order", {}, "cudnn"),
        (H100, "first_order", {"K": 128, "may_be_empty": True}, "cudnn"),
        (H100, "first_order", {"K": 129}, "mosaic_gpu"),  # most of cuDNN's work would be wasted
        (H100, "first_order", {"axis_type": AxisType.Auto}, "cudnn"),  # which XLA divides
        (H100, "reverse_of_tangent", {}, "mosaic_gpu"),
        (H100, "any", {}, "mosaic_gpu"),
        (H100, "any", {"axis_type": AxisType.Auto}, "xla"),
        (H100, "any", {"dtypes": ("float32",)}, "xla"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), "any", {}, "xla"),
        (TPU, "first_order", {}, "splash"),
        (TPU, "first_order", {"dtypes": ("float32",)}, "pallas_tpu"),
        (TPU, "reverse_of_tangent", {}, "pallas_tpu"),
        (TPU, "first_order", {"axis_type": AxisType.Auto}, "xla"),
        (("cpu", "cpu"), "first_order", {}, "xla"),
    ],
)
def test_what_is_expected_of_devices_that_are_not_here(target, derivatives, options, backend):
    assert chosen(target, derivatives, **options) == backend


def test_no_kernel_of_ours_is_taken_unchecked_where_it_could_be_checked(monkeypatch):
    monkeypatch.setattr(problems, "is_at_hand", lambda kind: True)
    assert chosen(H100, "any") == "xla"
    assert chosen(H100, "first_order", K=129) == "xla"
    assert chosen(H100, "first_order") == "cudnn"


# ---- config.model.attention_backend


@pytest.mark.parametrize(
    "target, changes, message",
    [
        (
            None,
            {"attention_backend": "mosaic_gpu"},
            "is 'mosaic_gpu', which .*: legal here are auto, reference, xla",
        ),
        (None, {"attention_backend": "cudnn"}, "is 'cudnn', which is for gpus, not cpus: legal here are auto"),
        (TPU, {"attention_backend": "mosaic_gpu"}, "is for gpus, not tpus: legal here are .* pallas_tpu, splash"),
        (
            H100,
            {"attention_backend": "mosaic_gpu", "head_dim": 160},
            "up to 128, not 160: .* auto, reference, xla",
        ),
        (H100, {"attention_backend": "mosaic_gpu", "compute_dtype": "float32"}, "bfloat16 or float16.* not float32"),
        (H100, {"attention_backend": "cudnn", "head_dim": 36}, "multiple of 8 up to 128, not bfloat16 and 36"),
    ],
)
def test_a_backend_that_cannot_compute_the_model_is_refused(target, changes, message):
    model = {"num_key_value_heads": 4, "head_dim": 64, "compute_dtype": "bfloat16"} | changes
    with for_target(*(target or ("cpu", "cpu"))), pytest.raises(UserError, match=message):
        choice.check(ModelConfig(**model))


def test_backends_that_can_are_not():
    model = {"num_key_value_heads": 4, "head_dim": 64, "compute_dtype": "bfloat16"}
    for target, backends in ((H100, ("mosaic_gpu", "cudnn")), (TPU, ("pallas_tpu", "splash"))):
        with for_target(*target):
            for backend in ("auto", "xla", "reference", *backends):
                choice.check(ModelConfig(**model, attention_backend=backend))
