"""What every test runs under: the CPU as eight virtual devices, float32 by default, examples drawn from fixed seeds."""

import os

# Before JAX starts. Compiling dominates these tests: without LLVM's optimisations it takes about 0.6 of the time.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def float64():
    """Float64 for the length of a test. (Session fixtures that need it enter `jax.enable_x64(True)` themselves.)"""
    with jax.enable_x64(True):
        yield
