"""A checkpoint comes back as it was, or says in one line why it cannot."""

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.config import CheckpointConfig, Config
from ttt_e2e.errors import UserError
from ttt_e2e.outer import sharding
from ttt_e2e.outer.checkpoint import Checkpoints, find_step, load_params, progress_of, save_params
from ttt_e2e.outer.steps import TrainState

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step: int) -> TrainState:
    params = {"fast": {}, "slow": {"embedding": jnp.arange(64.0).reshape(8, 8) * step}}
    return TrainState(params, {"mu": params}, jnp.int32(step))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), tree)


def progress(step: int) -> dict:
    return progress_of(step, next_batch=step + 7, config=Config())


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep=2, keep_every=4))
    for step in (2, 4, 6, 7):
        checkpoints.save(state(step), progress(step))
    checkpoints.wait()
    return checkpoints


def test_restored_to_the_bit_with_its_progress(saved):
    restored, restored_progress = saved.restore(7, abstract(state(7)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(7))
    assert restored_progress == progress(7)


def test_keeps_the_newest_and_every_nth(saved):
    assert sorted(int(path.name) for path in saved.directory.iterdir()) == [4, 6, 7]


def test_restored_onto_another_mesh(saved):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = sharding.shardings(state(7).params, mesh)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state(7).params, placed)
    restored = load_params(saved.directory, wanted)
    assert restored["slow"]["embedding"].sharding.spec == placed["slow"]["embedding"].spec
    np.testing.assert_array_equal(restored["slow"]["embedding"], state(7).params["slow"]["embedding"])


def test_a_path_may_name_the_run_its_checkpoints_or_a_step(saved, tmp_path):
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "7"):
        assert find_step(path) == saved.directory / "7"


def damage(kind: str, directory) -> None:
    """Damages the newest step of a checkpoint directory."""
    params = directory / "7" / "params"
    if kind == "no parameters":
        shutil.rmtree(params)
    elif kind == "no metadata":
        (params / "_METADATA").unlink()
    elif kind == "truncated":
        for file in Path(params).rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("kind", ("no parameters", "no metadata", "truncated"))
def test_a_damaged_checkpoint_is_one_line(kind, saved, capfd):
    damage(kind, saved.directory)
    with pytest.raises(UserError, match=r"checkpoint .*7/params") as caught:
        saved.restore(7, abstract(state(7)))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_shapes_that_differ_are_named(saved):
    wanted = {"fast": {}, "slow": {"embedding": jax.ShapeDtypeStruct((8, 9), jnp.float32, sharding=DEVICE)}}
    with pytest.raises(UserError, match=r"'slow.embedding' is \(8, 8\) in checkpoint .* makes it \(8, 9\)"):
        load_params(saved.directory, wanted)
    with pytest.raises(UserError, match=r"'slow.head' is not in checkpoint"):
        load_params(saved.directory, {"slow": {"head": wanted["slow"]["embedding"]}})
    with pytest.raises(UserError, match=r"no place for: slow.embedding"):
        load_params(saved.directory, {"fast": {}, "slow": {}})


@pytest.mark.parametrize("name", ("nowhere", "empty"))
def test_a_missing_checkpoint_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"checkpoint .*{name} (does not exist|holds no complete step)"):
        load_params(tmp_path / name, abstract(state(1).params))


def test_parameters_alone(tmp_path):
    step = save_params(tmp_path / "out", state(3).params, progress(0))
    restored = load_params(tmp_path / "out", abstract(state(3).params))
    jax.tree.map(np.testing.assert_array_equal, restored, state(3).params)
    assert find_step(tmp_path / "out") == step
    with pytest.raises(UserError, match="already exists"):
        save_params(tmp_path / "out", state(3).params, progress(0))


@pytest.fixture
def no_room():
    """No file may grow past 1 KiB: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


def test_a_full_disk_while_saving_leaves_the_checkpoint_before_it(tmp_path, no_room):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(state(1), progress(1))
    checkpoints.wait()
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)))
    large = TrainState({"slow": {"embedding": noise}}, {}, jnp.int32(2))
    with no_room(), pytest.raises(UserError, match=r"could not save a checkpoint .*; step 1 is whole") as caught:
        checkpoints.save(large, progress(2))
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    again = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    assert again.latest_step() == 1
    restored, _ = again.restore(1, abstract(state(1)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
