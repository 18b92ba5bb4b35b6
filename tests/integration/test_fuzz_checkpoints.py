"""Damaged checkpoints: the parameters come back to the bit, of this step or, said in one line, of the one before."""

import shutil
from contextlib import closing, suppress

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given

from tests.integration.fuzzing import fuzz, mutate, mutations
from ttt_e2e.checkpoints.manager import Checkpoints
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.config import CheckpointConfig, Config
from ttt_e2e.errors import UserError
from ttt_e2e.train.steps import TrainState

OLDER, NEWER = 3, 6


# The newer step's files, a pattern where Orbax draws the name at random; what matches and is largest is meant.
FILES = (
    *("_CHECKPOINT_METADATA", "commit_success.txt", "progress/metadata", "progress/commit_success.txt"),
    *(
        f"{item}/{name}"
        for item in ("params", "optimizer")
        for name in ("_METADATA", "_sharding", "commit_success.txt")
    ),
    *(f"{item}/{name}" for item in ("params", "optimizer") for name in ("manifest.ocdbt", "array_metadatas/process_0")),
    *(f"{item}/d/*" for item in ("params", "optimizer")),
    *(f"{item}/ocdbt.process_0/{name}" for item in ("params", "optimizer") for name in ("manifest.ocdbt", "d/*")),
)
METADATA = ("_CHECKPOINT_METADATA", "progress/metadata", "params/_METADATA", "optimizer/_METADATA", "params/_sharding")


def state(step: int) -> TrainState:
    """One matrix that does not compress, and its moments."""
    random = np.random.default_rng(step)
    params = {"fast": {}, "slow": {"embedding": jnp.asarray(random.normal(size=(16, 8)), jnp.float32)}}
    return TrainState(params, {"mu": params}, jnp.int32(step))


def abstract(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return with_shardings(tree, device)


def progress(step: int) -> dict:
    return progress_of(step, next_batch=step, config=Config())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A directory with two steps."""
    directory = tmp_path_factory.mktemp("whole") / "checkpoints"
    with closing(Checkpoints(directory, CheckpointConfig())) as checkpoints:
        for step in (OLDER, NEWER):
            checkpoints.save(state(step), progress(step), wait=True)
    return directory


def check(mutation: tuple, whole, directory, capfd) -> str:
    """Returns what became of it."""
    damaged = directory / "checkpoints"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(whole, damaged)
    kind, pattern, details = mutation
    file = max((damaged / str(NEWER)).glob(pattern), key=lambda path: path.stat().st_size)
    mutate(damaged, kind, file.relative_to(damaged), details)
    before = sorted(path.name for path in damaged.iterdir())
    with suppress(UserError):
        restored = load_params(damaged / str(NEWER), abstract(state(NEWER).params))
        jax.tree.map(np.testing.assert_array_equal, restored, state(NEWER).params)
    try:
        with closing(Checkpoints(damaged, CheckpointConfig())) as checkpoints:
            restored, found = checkpoints.restore_newest(abstract(state(NEWER)))
    except UserError as error:
        assert "\n" not in str(error) and str(damaged) in str(error)
        assert sorted(path.name for path in damaged.iterdir()) == before
        return "refused"
    finally:
        assert "Traceback" not in capfd.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, restored, state(found["step"]))
    assert progress(found["step"]).items() <= found.items()
    if found["step"] == NEWER:
        return "whole"
    assert (damaged / f"{NEWER}.damaged").is_dir() and (damaged / str(OLDER)).is_dir()
    return "set aside"


@fuzz(15)
@given(mutation=mutations(FILES, METADATA))
@example(mutation=("json", "_CHECKPOINT_METADATA", (0, 0)))
@example(mutation=("fill", "params/d/*", b"garbage"))
def test_a_damaged_checkpoint_is_not_taken_for_another(mutation, whole, tmp_path, capfd):
    check(mutation, whole, tmp_path, capfd)


@pytest.mark.slow
@fuzz(250)
@given(mutation=mutations(FILES, METADATA))
def test_many_damaged_checkpoints(mutation, whole, tmp_path, capfd):
    check(mutation, whole, tmp_path, capfd)


def test_without_the_metadata_that_stops_a_run_it_goes_on(whole, tmp_path, capfd):
    """As the message advises."""
    assert check(("json", "_CHECKPOINT_METADATA", (0, 0)), whole, tmp_path, capfd) == "refused"
    assert check(("delete", "_CHECKPOINT_METADATA", None), whole, tmp_path, capfd) == "whole"
