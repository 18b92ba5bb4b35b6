"""What every test runs under: the CPU as eight virtual devices, float32 by default, examples drawn from fixed seeds."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

# Before JAX starts. Compiling dominates these tests. Without LLVM's optimisations it takes 0.6 of the time; where XLA
# writes the code of fusions itself, not by way of MLIR, a third of that: JAX 0.10 still can.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests, and the commands that some of them start, compile the same programs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# A script that starts the tests in the background has them ignore Ctrl-C, and with them the programs that they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis
import jax
import pytest

from tests.tiny_run import token_store  # noqa: F401 (a fixture)

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("tests")
# Tracing makes many objects that live on: looking for garbage at every 700 new ones takes a twentieth of its time.
gc.set_threshold(20_000)

# Of processor time, which other work on the machine changes less than wall time; .ci/run sets it.
MAX_SECONDS = float(os.environ.get("MAX_TEST_SECONDS", "inf"))


@pytest.fixture
def float64():
    """Float64 for the length of a test. (Session fixtures that need it enter `jax.enable_x64(True)` themselves.)"""
    with jax.enable_x64(True):
        yield


# The fixtures that a test is the first to ask for count for it.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _timed("setup", item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _timed("call", item))


def _timed(phase: str, item):
    """Runs a phase of a test; records its processor time for `--junitxml`, and fails where it is too long."""
    start = _processor_seconds()
    result = yield
    seconds = _processor_seconds() - start
    item.user_properties.append((f"{phase}_processor_seconds", round(seconds, 2)))
    may_be_long = item.get_closest_marker("slow") or item.get_closest_marker("processes")
    if seconds > MAX_SECONDS and not may_be_long:
        pytest.fail(f"{seconds:.0f} s of processor time: a test past {MAX_SECONDS:.0f} s is marked slow", pytrace=False)
    return result


def _processor_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    return sum(os.times()[:4])
