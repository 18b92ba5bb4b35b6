"""Where nothing can be written: one line and exit code 2, before anything is read, and nothing half-written."""

import errno

import numpy as np
import pytest

from tests.file_systems import make_read_only, mounted
from tests.parity.golden import load_case
from tests.test_cli import case_config_file, run  # noqa: F401 (a fixture)
from ttt_e2e import cli
from ttt_e2e.bench import table
from ttt_e2e.config import default_config
from ttt_e2e.data.prepare import prepare
from ttt_e2e.errors import UserError
from ttt_e2e.evaluation import token_losses
from ttt_e2e.evaluation.records import Records
from ttt_e2e.interop import safetensors_files
from ttt_e2e.runs.files import replace_text
from ttt_e2e.runs.metrics import MetricsWriter

# All that they would read is missing: OUT is said first. MODEL: the flags of a model.
COMMANDS = (
    "prepare --input=no --tokenizer=bytes --output=OUT",
    "prepare --merge=no,none --output=OUT",
    "train --config=configs/quickstart.py --config.data.path=no --workdir=OUT",
    "evaluate MODEL --output=OUT",
    "evaluate MODEL --needle=1 --output=OUT",
    "generate MODEL --prompt=a --output=OUT/file",
    "generate MODEL --prompt=a --save_state=OUT",
    "import --source=official MODEL --output=OUT",
    "import --source=huggingface --checkpoint=no --output=OUT",
    "export --target=huggingface MODEL --output=OUT",
    "report --workdirs=no --output=OUT",
    "bench meta_gradient --output=OUT",
    "bench latency --output=OUT",
    "bench target --target=h100:8 --output=OUT",
)


@pytest.fixture
def out(request, tmp_path):
    """A directory that cannot be made, below a file or on a file system that takes nothing, or is a file itself."""
    where = tmp_path / "where"
    if request.param in ("below a file", "a file"):
        where.write_text("mine")
        yield where / "x" if request.param == "below a file" else where
        assert where.read_text() == "mine"
        return
    with mounted(where, "100k"):
        if request.param == "full":
            with pytest.raises(OSError, match="No space"):
                (where / "file").write_bytes(bytes(200_000))
        else:
            make_read_only(where)
        before = sorted(where.rglob("*"))
        yield where / "x/y"
        assert sorted(where.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("out", ["below a file", "a file"], indirect=True)
def test_every_command_says_so_before_it_begins(command, out, run):  # noqa: F811
    arguments = command.replace("MODEL", "--config=configs/quickstart.py --checkpoint=no").replace("OUT", str(out))
    code, lines = run(*arguments.split())
    assert code == 2
    assert len(lines) == 1, lines
    assert str(out) in lines[0] and "cannot be written" in lines[0] and "Not a directory" in lines[0]


@pytest.mark.parametrize(
    "out, reason", (("full", "No space left on device"), ("read-only", "Read-only file system")), indirect=["out"]
)
def test_a_disk_that_takes_nothing_is_said_before_anything_is_read(out, reason, run):  # noqa: F811
    for command in ("prepare --input=no --tokenizer=bytes --output=", "report --workdirs=no --output="):
        code, lines = run(*f"{command}{out}".split())
        assert code == 2 and len(lines) == 1 and reason in lines[0], lines


# ------------------------------------------------------------------------------- the disk becomes full in the middle


@pytest.fixture
def small(tmp_path):
    with mounted(tmp_path / "small", "100k") as directory:
        yield directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_losses_of_before_stay_where_new_ones_find_no_room(small):
    token_losses._write(small, {"loss": 1}, {"token_nll": np.zeros((2, 64))})
    before = {path: path.read_bytes() for path in small.iterdir()}
    with pytest.raises(UserError, match=r"token_nll.npy cannot be written \(\d+ requested and \d+ written"):
        token_losses._write(small, {"loss": 2}, {"token_nll": np.zeros((400, 64))})
    assert {path: path.read_bytes() for path in small.iterdir()} == before


def test_files_are_replaced_or_left(small):
    replace_text(small / "file", "old")
    with pytest.raises(UserError, match=r"small/file cannot be written \(No space left on device\)"):
        replace_text(small / "file", "new" * 100_000)
    with pytest.raises(UserError, match=r"cannot be written"):
        table.write(small / "bench", [{"variant": "x" * 200_000}], "A table")
    assert (small / "file").read_text() == "old" and names(small / "bench") == []


def test_a_store_for_which_there_is_no_room_is_removed(small, tmp_path):
    random, root = np.random.default_rng(0), tmp_path / "corpus"
    root.mkdir()
    for i in range(20):
        (root / f"{i}.txt").write_bytes(random.integers(32, 127, 20_000, np.uint8).tobytes())
    with pytest.raises(UserError, match=r"cannot be written \(.*No space left on device"):
        prepare(str(root), "bytes", small / "store", progress=False, num_workers=0)
    assert names(small) == []


def test_an_import_for_which_there_is_no_room_is_removed(small, run, tmp_path):  # noqa: F811
    case = load_case("e2e_tied")
    flags = f"--config={case_config_file(case, tmp_path / 'config.py')}", f"--checkpoint={case.path / 'checkpoint'}"
    code, lines = run("import", "--source=official", *flags, f"--output={small}/imported")
    assert code == 2 and len(lines) == 1 and "could not save a checkpoint" in lines[0], lines
    assert names(small) == []


def test_tensors_for_which_there_is_no_room(small):
    pytest.importorskip("safetensors")
    tensor = ((100_000,), np.float32, lambda: np.zeros(100_000, np.float32))
    with pytest.raises(UserError, match=r"model.safetensors cannot be written: .*No space left on device"):
        safetensors_files.write(small, {"weight": tensor}, {})


def test_lines_of_metrics_and_records_are_whole_or_said_to_be_missing(small):
    config = default_config_of_a_run()
    writer = MetricsWriter(small, config, 0)
    records = Records(small, "needle", {}, key=("n",))
    filler = small / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(200_000))
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match=r"needle.jsonl cannot be written"):
        records.add([{"n": i, "text": "x" * 5000} for i in range(2)])
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written"):
        writer.close()
    filler.unlink()
    assert Records(small, "needle", {}, key=("n",)).done == {}
    MetricsWriter(small, config, 0).close()


def default_config_of_a_run():
    from ttt_e2e.config import from_config_dict

    return from_config_dict(default_config())


@pytest.mark.parametrize("number", (errno.ENOSPC, errno.EROFS, errno.EDQUOT))
def test_no_trace_of_the_stack_for_a_full_disk(number, run, monkeypatch):  # noqa: F811
    def report(argv):
        raise OSError(number, "it says", "/some/file")

    monkeypatch.setitem(cli.COMMANDS, "report", report)
    assert run("report") == (2, ["error: /some/file cannot be written: it says"])


def test_other_errors_of_the_system_have_one(run, monkeypatch):  # noqa: F811
    def report(argv):
        raise OSError(errno.EBADF, "a defect")

    monkeypatch.setitem(cli.COMMANDS, "report", report)
    with pytest.raises(OSError, match="a defect"):
        run("report")
