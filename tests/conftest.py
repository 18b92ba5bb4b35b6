"""What every test runs under: the CPU as eight virtual devices, float32 by default, examples drawn from fixed seeds."""

import os
from pathlib import Path

# Before JAX starts. Compiling dominates these tests: without LLVM's optimisations it takes about 0.6 of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests, and the commands that some of them start, compile the same programs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import hypothesis
import jax
import pytest

from tests.tiny_run import token_store  # noqa: F401 (a fixture)

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def float64():
    """Float64 for the length of a test. (Session fixtures that need it enter `jax.enable_x64(True)` themselves.)"""
    with jax.enable_x64(True):
        yield
