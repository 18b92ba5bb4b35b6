"""`~` means home in every flag and every config field that is a path."""

import os

import pytest
from absl import flags

from ttt_e2e import cli
from ttt_e2e.config import each_field, expand_home, from_config_dict
from ttt_e2e.flags import PathListParser, PathParser, load_config_file

# Strings that are no paths: a new flag is one of these, or `~` means home in it.
TEXTS = {
    "coordinator",
    "learn",
    "lm_eval",
    "lm_eval_learn",
    "lm_eval_metadata",
    "on_bad_record",
    "part",
    "precision",
    "prompt",
    "source",
    "stop",
    "target",
    "text_field",
}
# Of benchmarks all strings are expanded: names do not begin with `~`.
BENCHMARKS = ("latency", "target", "mixers")


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags_of(command, monkeypatch) -> flags.FlagValues:
    """The flags that a command defines."""
    defined = flags.FlagValues()

    def take(argv, define, usage):
        define(defined)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", take)
    assert cli.main([command]) == 130
    return defined


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "bench"])
def test_every_flag_that_is_no_text_is_a_path(command, monkeypatch, home):
    values = flags_of(command, monkeypatch)
    strings = {name for name in values if values[name].flag_type() not in ("int", "float", "bool", "multi int")}
    paths = {name for name in strings if isinstance(values[name].parser, PathParser | PathListParser)}
    integers = {name for name in strings if name.startswith(("needle", "context_lengths"))}  # lists of them
    assert strings - paths <= TEXTS | integers
    assert paths & {"config", "output", "workdir", "workdirs"}
    for name in paths:
        values[name].parse("~/a")
        value = values[name].value
        assert (value if isinstance(value, str) else value[-1]) == f"{home}/a", name


def test_every_place_where_a_path_begins(home, monkeypatch):
    for text, expected in (
        ("~", f"{home}"),
        ("~/x", f"{home}/x"),
        ("~/a:0.7, ~/b:0.3", f"{home}/a:0.7, {home}/b:0.3"),
        ("~/adapt.py:~/start,~/base", f"{home}/adapt.py:{home}/start,{home}/base"),
        ("/x/~/y", "/x/~/y"),
        ("a~", "a~"),
        ("x,~no-such-user/y", "x,~no-such-user/y"),
        ("gs://bucket/~me/x", "gs://bucket/~me/x"),
        ("bytes", "bytes"),
        ("", ""),
    ):
        assert expand_home(text) == expected
    assert expand_home("~root/x") == os.path.expanduser("~root/x") != "~root/x"


def test_every_config_field_that_is_a_path(home):
    """By value: from flags, config files and the config.json of runs; a mixture has several paths."""
    fields = {"data": {"path": "~/a:0.5,~/b:0.5", "tokenizer": "~/t.model"}, "train": {"init_from": "~/i", "base": "~"}}
    config = from_config_dict(fields)
    assert config.data.path == f"{home}/a:0.5,{home}/b:0.5" and config.data.tokenizer == f"{home}/t.model"
    assert (config.train.init_from, config.train.base) == (f"{home}/i", str(home))
    # A field whose help speaks of a directory or a file is marked. (Names of splits, projects and patterns are not.)
    texts = {"model.mixer", "optimizer.name", "optimizer.train_only", "data.train_split", "data.eval_split"}
    texts |= {"log.wandb", "model.engram.blocks"}
    free = {
        f"{at}.{f.name}" for at, f, _ in each_field(config) if isinstance(f.default, str) and not f.metadata["choices"]
    }
    marked = {f"{at}.{f.name}" for at, f, _ in each_field(config) if f.metadata["is_path"]}
    assert marked == free - texts


def test_commands_read_and_write_below_home(home, capsys):
    (home / "t").mkdir()
    for name in "abc":
        (home / "t" / f"{name}.txt").write_text(f"a text of {name} " * 20)
    code = cli.main(["prepare", "--input=~/t", "--tokenizer=train:300", "--output", "~/made/s"])
    assert code == 2  # the text is too small for 300 entries, and was found
    assert "vocabulary" in capsys.readouterr().err
    assert cli.main(["prepare", "--input", "~/t/a.txt,~/t/b.txt", "--tokenizer=bytes", "--output=~/made/s"]) == 0
    assert (home / "made" / "s" / "zarr.json").exists() and not (home / "~").exists()
    (home / "c.py").write_text(
        "from ttt_e2e.config import default_config\n"
        "def get_config(arg=''):\n    config = default_config()\n    config.data.path = arg\n    return config\n"
    )
    capsys.readouterr()
    argv = ["train", "--config=~/c.py:~/made/none", "--workdir=~/run", "--config.train.init_from=~/no"]
    assert cli.main(argv) == 2
    assert f"error: {home}/made/none: no token store" in capsys.readouterr().err
    assert load_config_file(f"{home}/c.py").data.path == ""
    assert cli.main(["evaluate", "--workdir=~/no"]) == 2
    assert f"workdir {home}/no holds no run" in capsys.readouterr().err
    assert cli.main(["report", "--workdirs=~/no,~/no2", "--output=~/r"]) == 2
    assert f"error: {home}/no is no run" in capsys.readouterr().err
    assert not (home / "~").exists() and not (home / "run").exists()


def test_the_configs_of_a_benchmark(home, capsys):
    for name in BENCHMARKS:
        with pytest.raises(SystemExit):
            cli.main(["bench", name, "--help"])
    capsys.readouterr()
    assert cli.main(["bench", "latency", "--output=~/b", "--configs=~/no.py", "--context_lengths=5e2"]) == 2
    assert f"{home}/no.py" in capsys.readouterr().err
    assert not (home / "~").exists()
