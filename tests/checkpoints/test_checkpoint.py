"""A checkpoint comes back as it was, or says in one line why it cannot."""

import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_e2e.checkpoints.digests import _program, digests
from ttt_e2e.checkpoints.manager import Checkpoints
from ttt_e2e.checkpoints.params import load_params, save_params
from ttt_e2e.checkpoints.progress import DamagedError, progress_of
from ttt_e2e.checkpoints.steps import find_step, saved_steps
from ttt_e2e.cluster.mesh import shardings, with_shardings
from ttt_e2e.config import CheckpointConfig, Config, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.train.steps import TrainState

MOMENTS = {"mu": jnp.ones(3)}  # Orbax takes no empty item
OLD_DIGESTS = {"bfloat16": 2056287712, "bool": 1030387624, "float32": 1977614336, "int32": 2599122334}
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step: int) -> TrainState:
    params = {"fast": {}, "slow": {"embedding": jnp.arange(64.0).reshape(8, 8) * step}}
    return TrainState(params, {"mu": params}, jnp.int32(step))


def abstract(tree):
    return with_shardings(tree, DEVICE)


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
    assert progress(7).items() <= restored_progress.items()


def test_keeps_the_newest_and_every_nth(saved):
    assert sorted(int(path.name) for path in saved.directory.iterdir()) == [4, 6, 7]


def test_restored_onto_another_mesh(saved):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = shardings(state(7).params, mesh, ModelConfig())
    restored = load_params(saved.directory, with_shardings(state(7).params, placed))
    assert restored["slow"]["embedding"].sharding.spec == placed["slow"]["embedding"].spec
    np.testing.assert_array_equal(restored["slow"]["embedding"], state(7).params["slow"]["embedding"])


def test_a_path_may_name_the_run_its_checkpoints_or_a_step(saved, tmp_path):
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "7"):
        assert find_step(path) == saved.directory / "7"


def test_only_steps_that_are_whole_count(tmp_path):
    for name in ("3", "10", "7.damaged", "12.orbax-checkpoint-tmp", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "11").write_text("a file")
    assert saved_steps(tmp_path) == [3, 10] and saved_steps(tmp_path / "nowhere") == []


def damage(kind: str, directory) -> None:
    """Damages the newest step of a checkpoint directory."""
    params = directory / "7" / "params"
    if kind == "no parameters":
        shutil.rmtree(params)
    elif kind == "no metadata":
        (params / "_METADATA").unlink()
    elif kind == "no progress":
        shutil.rmtree(directory / "7" / "progress")
    elif kind == "truncated":
        for file in Path(params).rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = ("no parameters", "no metadata", "no progress", "truncated")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(kind, saved, capfd):
    damage(kind, saved.directory)
    with pytest.raises(DamagedError, match=r"checkpoint .*7") as caught:
        saved.restore(7, abstract(state(7)))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_step_is_set_aside_for_the_one_before(kind, saved, tmp_path, caplog):
    damage(kind, saved.directory)
    with caplog.at_level("WARNING"):
        restored, restored_progress = saved.restore_newest(abstract(state(6)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(6))
    assert restored_progress["step"] == 6
    assert caplog.text.count("7.damaged; going back to step 6") == 1
    assert sorted(path.name for path in saved.directory.iterdir()) == ["4", "6", "7.damaged"]
    # The step is made again, and what was set aside stays.
    saved.save(state(7), progress(7), wait=True)
    assert saved_steps(saved.directory) == [4, 6, 7] and find_step(tmp_path) == saved.directory / "7"
    assert (saved.directory / "7.damaged").exists()


def test_where_all_is_damaged_nothing_is_renamed(saved):
    for step in (4, 6, 7):
        shutil.rmtree(saved.directory / str(step) / "progress")
    with pytest.raises(UserError, match=r"7 is incomplete.*; no other step of .* is whole"):
        saved.restore_newest(abstract(state(7)))
    assert sorted(path.name for path in saved.directory.iterdir()) == ["4", "6", "7"]


def test_a_flipped_byte_anywhere_is_seen_or_harmless(tmp_path):
    """Every file of a step, at places of it: the restore fails in one line, or gives what was saved to the bit."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    random = np.random.default_rng(0)
    noise = TrainState(
        {"fast": {}, "slow": {"embedding": jnp.asarray(random.normal(size=(16, 8)))}}, MOMENTS, jnp.int32(3)
    )
    checkpoints.save(noise, progress(3), wait=True)
    files = [file for file in Path(checkpoints.directory / "3").rglob("*") if file.is_file() and file.stat().st_size]
    outcomes = {}
    for file in files:
        whole = file.read_bytes()
        for _ in range(2):
            place = int(random.integers(len(whole)))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << random.integers(8)]) + whole[place + 1 :])
            try:
                restored, restored_progress = checkpoints.restore(3, abstract(noise))
            except UserError as error:
                assert "\n" not in str(error)
                outcomes.setdefault(file.name, []).append("seen")
            else:
                jax.tree.map(np.testing.assert_array_equal, restored, noise)
                assert progress(3).items() <= restored_progress.items()
        file.write_bytes(whole)
    assert sum(map(len, outcomes.values())) >= 4, outcomes  # the test flips what matters, too


def test_a_save_that_fails_is_tried_again(tmp_path, no_room, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    room = no_room()
    room.__enter__()
    monkeypatch.setattr("ttt_e2e.checkpoints.manager.time.sleep", lambda _: room.__exit__(None, None, None))
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)))
    large = TrainState({"fast": {}, "slow": {"embedding": noise}}, MOMENTS, jnp.int32(2))
    with caplog.at_level("WARNING"):
        checkpoints.save(large, progress(2), wait=True)
    assert caplog.text.count("could not save step 2") == 1
    restored, _ = checkpoints.restore(2, abstract(large))
    jax.tree.map(np.testing.assert_array_equal, restored, large)


def test_digests_depend_on_every_bit_and_place_but_not_on_the_mesh():
    array = jnp.arange(64.0).reshape(8, 8)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model")))
    assert digests({"w": array}) == digests({"w": spread})
    assert digests({"w": array}) != digests({"w": array.at[3, 5].set(-29.0)})
    assert digests({"w": array}) != digests({"w": array.T})
    assert digests({"w": jnp.zeros(3)}) != digests({"w": jnp.asarray([0.0, -0.0, 0.0])})


def test_digests_of_old_checkpoints_stay_what_they_were():
    """Numbers as they stand in checkpoints that were saved before: of every dtype, and of more than one axis."""
    ramp = np.arange(24).reshape(2, 3, 4)
    dtypes = ("bfloat16", "float32", "int32", "bool")
    found = digests({dtype: jnp.asarray(ramp % 7, dtype) for dtype in dtypes})
    assert {name: digest for name, (_, digest) in found.items()} == OLD_DIGESTS


@pytest.mark.parametrize("is_kept", (True, False))
def test_digests_are_compiled_once_a_run(is_kept, tmp_path, monkeypatch, caplog):
    """Over several saves and a restore, on a mesh; a program made anew each time would be seen."""
    if is_kept:
        _program.cache_clear()
    else:
        monkeypatch.setattr("ttt_e2e.checkpoints.digests._program", _program.__wrapped__)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = shardings(state(1), mesh, ModelConfig())
    wanted = with_shardings(state(1), placed)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for step in (1, 2, 3):
            checkpoints.save(jax.device_put(state(step), placed), progress(step), wait=True)
        restored, _ = checkpoints.restore_newest(wanted)
        checkpoints.save(restored._replace(step=restored.step + 1), progress(4), wait=True)
    assert restored.step == 3
    compiled = sum(record.message.startswith("Compiling jit(digest_arrays)") for record in caplog.records)
    assert compiled == (1 if is_kept else 5)


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
    large = TrainState({"slow": {"embedding": noise}}, MOMENTS, jnp.int32(2))
    with no_room(), pytest.raises(UserError, match=r"could not save a checkpoint .*; step 1 is whole") as caught:
        checkpoints.save(large, progress(2))
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    assert saved_steps(tmp_path / "checkpoints") == [1]
    again = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    restored, _ = again.restore(1, abstract(state(1)))
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
