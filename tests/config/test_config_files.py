"""Config files that are legal Python are read, whatever the command that reads them; mistakes in them are one line."""

import sys

import pytest

from ttt_e2e import cli
from ttt_e2e.config import from_config_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, load_sweep, override
from ttt_e2e.sweep import make_points

HEAD = "from ttt_e2e.config import default_config\n"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a config file below a directory, which is not on the path of Python; returns its path."""
    # As under the command `ttt-e2e`: neither the working directory nor that of the file is there.
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", ".")])
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine/config.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def test_a_dataclass_with_annotations_that_are_strings(make):
    text = f"""from __future__ import annotations
import dataclasses, enum, typing
{HEAD}
@dataclasses.dataclass
class Size:
    width: int = 64
    kind: typing.ClassVar[str] = "x"

class Seed(enum.IntEnum):
    FIRST = 5

def get_config():
    assert typing.get_type_hints(Size)["width"] is int
    config = default_config()
    config.model.hidden_size = Size().width
    config.train.seed = Seed.FIRST
    return config

def sweep():
    return {{"train.seed": [dataclasses.asdict(Size())["width"]]}}
"""
    path = make(text)
    config = override(load_config_file(path), [])
    assert (config.model.hidden_size, config.train.seed, type(config.train.seed)) == (64, 5, int)
    assert load_sweep(path) == {"train.seed": [64]}


def test_neighbours_and_modules_of_the_working_directory_are_imported(make, tmp_path):
    text = f"{HEAD}import neighbour\ndef get_config():\n    import late\n    config = default_config()\n"
    text += "    config.train.seed = neighbour.SEED + late.SEED\n    return config\n"
    first, second = make(text), make(text, "other/config.py")
    make("SEED = 1", "mine/neighbour.py"), make("SEED = 20", "mine/late.py")
    make("SEED = 3", "other/neighbour.py"), make("SEED = 40", "other/late.py")
    before = list(sys.path)
    # The control: each file has its own neighbours, though their names are the same.
    assert [load_config_file(path).train.seed for path in (first, second, first)] == [21, 43, 21]
    assert load_config_file("mine/config.py").train.seed == 21
    assert sys.path == before and not {"neighbour", "late"} & set(sys.modules)
    (tmp_path / "below").mkdir()
    make("SEED = 7", "below/there.py")
    path = make(f"{HEAD}from below.there import SEED\ndef get_config():\n    return default_config()\n")
    assert load_config_file(path).train.seed == 0
    # A name of Python's own is not shadowed for others, and a file that fails leaves nothing behind.
    path = make("import neighbour\nraise ValueError('no')")
    with pytest.raises(UserError, match="ValueError: no"):
        load_config_file(path)
    assert sys.path == before and "neighbour" not in sys.modules


def test_a_config_file_does_not_replace_a_module_of_its_name(make):
    load_config_file(make(f"{HEAD}def get_config():\n    return default_config()\n", "mine/json.py"))
    import json

    assert json.loads("1") == 1


PLACEHOLDERS = f"""{HEAD}
from ml_collections import config_dict
def get_config():
    config = default_config()
    config.train.num_steps = config_dict.required_placeholder(int)
    config.data.path = config_dict.placeholder(str)
    config.optimizer.decay_steps = config.train.get_ref("seq_len")
    return config

def sweep():
    return {{"train.num_steps": [50, 60]}}
"""


def test_a_required_placeholder_takes_its_override(make, capsys, tmp_path):
    path = make(PLACEHOLDERS)
    given = ["--config.train.num_steps=5e1", "--config.data.path=s", "--config.train.seq_len=64"]
    given.append("--config.inner.mini_batch_size=8")
    config = override(load_config_file(path), given)
    assert (config.train.num_steps, config.data.path, config.optimizer.decay_steps) == (50, "s", 64)
    for missing, message in (
        (0, "config.train.num_steps has no value yet .*: set it by --config.train.num_steps=VALUE"),
        (1, "config.data.path is None"),
    ):
        with pytest.raises(UserError, match=message):
            override(load_config_file(path), [g for i, g in enumerate(given) if i != missing])
    assert cli.main(["train", f"--config={path}", f"--workdir={tmp_path}/run"]) == 2
    assert capsys.readouterr().err.startswith("error: config.train.num_steps has no value yet")
    # A sweep may give it, too.
    points = make_points(path, given[1:], [], tmp_path)
    assert [point.config.train.num_steps for point in points] == [50, 60]


def test_values_of_numpy_and_paths(make):
    text = f"""{HEAD}
import enum, pathlib
import numpy as np
class Name(enum.Enum):
    MUON = "muon"
def get_config():
    config = default_config()
    config.train.num_steps = np.int64(50)
    config.train.seed = np.arange(7)[6]
    config.optimizer.update(learning_rate=np.float32(0.5), weight_decay=np.int32(1), name=Name.MUON)
    config.data.update(path=pathlib.Path("a") / "b", shuffle=np.bool_(False), tokenizer=np.str_("bytes"))
    config.model.mamba2.chunk_size = np.array(8)
    return config
"""
    config = override(load_config_file(make(text)), [])
    found = (config.train.num_steps, config.train.seed, config.optimizer.learning_rate, config.optimizer.weight_decay)
    assert found == (50, 6, 0.5, 1.0) and list(map(type, found)) == [int, int, float, float]
    assert (config.optimizer.name, config.data.path, config.data.tokenizer) == ("muon", "a/b", "bytes")
    assert config.data.shuffle is False and type(config.data.tokenizer) is str
    assert dict(config.model.mixer_sections)["mamba2"].chunk_size == 8


@pytest.mark.parametrize(
    ("line", "message"),
    (
        ("config.train.num_steps = np.float64(0.5)", "config.train.num_steps is 0.5, but it takes one integer"),
        ("config.train.num_steps = np.array([3])", r"config.train.num_steps is array\(\[3\]\), but it takes one"),
        ("config.train.num_steps = np.bool_(True)", "config.train.num_steps is True"),
        ("config.train.num_steps = '3'", "config.train.num_steps is '3', but it takes one integer"),
        ("config.data.path = 3", "config.data.path is 3, but it takes one string"),
        ("config.data.shuffle = 1", "config.data.shuffle is 1, but it takes True or False"),
        ("config.train = 3", "config.train is 3, but it is a section"),
        ("config.train.num_stps = 3", "num_stps"),
    ),
)
def test_values_of_other_types_are_named(line, message, make):
    text = (
        f"{HEAD}import numpy as np\ndef get_config():\n    config = default_config()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError, match=message):
        override(load_config_file(make(text)), [])
    assert from_config_dict({}).train.num_steps == 100
