"""Flags: what is unambiguous is taken, a flag that is given twice is said, and a hint names what was meant."""

import logging
import re

import pytest
from absl import flags
from ml_collections import ConfigDict

from ttt_e2e import __version__, cli
from ttt_e2e.config import to_dict
from ttt_e2e.errors import UserError
from ttt_e2e.flags import override, parse


def define(values):
    flags.DEFINE_string("config", "", "Config file.", flag_values=values)
    flags.DEFINE_string("workdir", "", "Directory.", flag_values=values)
    flags.DEFINE_integer("process_id", 0, "Number.", flag_values=values)
    flags.DEFINE_boolean("generation", False, "Whether.", flag_values=values)
    flags.DEFINE_multi_string("stop", [], "Text.", flag_values=values)


def parsed(*argv):
    """The values of flags, and the config with the overrides."""
    values, overrides = parse(list(argv), define, "usage")
    return values, override(ConfigDict({}), overrides)


@pytest.mark.parametrize("text", ("1000", "1e3", "1E3", "1000.0", "1_000"))
def test_an_integer_is_taken_however_it_is_written(text):
    values, config = parsed(f"--config.train.num_steps={text}", f"--process_id={text}")
    assert config.train.num_steps == values.process_id == 1000


@pytest.mark.parametrize("text", ("1.5e0", "1e", "nan", "inf", "3,4", "wide", "", "9" * 5000))
def test_what_is_no_integer_is_refused(text):
    with pytest.raises(UserError, match=r"^(--config.train.num_steps=.*one integer|config.train.num_steps is)"):
        parsed(f"--config.train.num_steps={text}")
    with pytest.raises(UserError, match="process_id"):
        parsed(f"--process_id={text}")


def test_a_value_may_follow_its_flag():
    argv = "--workdir runs/x --config.train.num_steps 70 --process_id -1 --config.data.shuffle false --generation true"
    values, config = parsed(*argv.split(), "--stop", "- a b", "--config.data.path", "s")
    assert (values.workdir, values.process_id, values.generation, values.stop) == ("runs/x", -1, True, ["- a b"])
    assert (config.train.num_steps, config.data.shuffle, config.data.path) == (70, False, "s")


def test_booleans_take_every_form():
    for text, expected in (("--generation", True), ("--nogeneration", False), ("--generation=false", False)):
        assert parsed(text)[0].generation is expected
    for text, expected in (("", True), ("=0", False), ("=1", True)):
        assert parsed(f"--config.data.shuffle{text}")[1].data.shuffle is expected
    assert parsed("--noconfig.data.shuffle")[1].data.shuffle is False
    assert parsed("-config.train.seed=3", "-workdir=w")[1].train.seed == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    (
        ("--workdir --config.train.seed=1", "--workdir has no value"),  # a flag is no value
        ("--config.train.seed", "--config.train.seed has no value"),
        ("--generation maybe", "unexpected argument 'maybe'"),
        ("--config.data.shuffle=maybe", "config.data.shuffle=maybe: it takes true or false"),
        ("--num_steps=3", "--num_steps: did you mean --config.train.num_steps"),
        ("--num_steps 3", "--num_steps: did you mean --config.train.num_steps"),
        ("--train.num_steps=3", "did you mean --config.train.num_steps"),
        ("--seed=3", "did you mean --config.data.seed or --config.train.seed"),
        ("--config.num_stps 3", "config.num_stps: did you mean 'train.num_steps'"),
        ("--config.num_steps=3", "config.num_steps: did you mean 'train.num_steps'"),
        ("--config.model.num_steps=3", "config.model.num_steps: did you mean 'train.num_steps'"),
        ("--wokdir=3", "did you mean 'workdir'"),
    ),
)
def test_a_hint_names_what_was_meant(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parsed(*argv.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    (
        ("--workdir=a --workdir=b", ["--workdir"]),
        ("--config.train.seed=1 --config.train.seed=2", ["--config.train.seed"]),
        ("--generation --nogeneration --workdir a -workdir b", ["--generation", "--workdir"]),
        ("--workdir=a --workdir=a --config.train.seed=10 --config.train.seed=1e1", []),  # no contradiction
        ("--stop=a --stop=b", []),  # takes several
    ),
)
def test_a_flag_with_several_values_is_said_and_the_last_counts(argv, said, caplog):
    with caplog.at_level(logging.WARNING):
        values, config = parsed(*argv.split())
    assert [record.getMessage().split()[0] for record in caplog.records] == said
    assert all("the last one counts" in record.getMessage() for record in caplog.records)
    assert values.workdir in ("", "a" if not said else "b") and config.train.seed in (0, 2, 10)
    assert values.generation is False


def test_overrides_do_not_depend_on_what_the_config_has():
    for base in (ConfigDict({}), ConfigDict({"train": {"seed": 1}}), ConfigDict({"train": {"seed": 1.0}}).lock()):
        config = override(base, ["--config.train.seed=5", "--config.model.mamba2.chunk_size=8"])
        assert config.train.seed == 5 and dict(config.model.mixer_sections)["mamba2"].chunk_size == 8
    base = ConfigDict({"train": {"seq_len": 64}, "inner": {}})
    base.inner.mini_batch_size = base.train.get_ref("seq_len")
    assert override(base, ["--config.train.seq_len=32"]).inner.mini_batch_size == 32  # it refers to seq_len
    assert to_dict(override(ConfigDict({}), []))["train"]["num_steps"] == 100


def help_of(*argv, capsys) -> str:
    try:
        assert cli.main(list(argv)) == 0
    except SystemExit as exit:
        assert exit.code == 0
    return capsys.readouterr().out


def test_help_is_that_of_what_it_is_asked_of(capsys):
    train = help_of("train", "--help", capsys=capsys)
    assert "--workdir" in train
    for argv in (["help", "train"], ["--help", "train"], ["train", "-h"]):
        assert help_of(*argv, capsys=capsys) == train
    names = help_of("bench", "--help", capsys=capsys)
    assert "  latency " in names and "--repeats" not in names
    assert help_of("bench", "-h", capsys=capsys) == help_of("help", "bench", capsys=capsys) == names
    latency = help_of("bench", "latency", "--help", capsys=capsys)
    assert "--repeats" in latency
    assert help_of("help", "bench", "latency", capsys=capsys) == latency
    assert cli.main(["help", "trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


def test_the_version(capsys):
    text = help_of("--version", capsys=capsys)
    assert re.fullmatch(rf"ttt-e2e {re.escape(__version__)}, JAX [\d.]+\w*, Python [\d.]+\n", text)
    assert "--version" in help_of("--help", capsys=capsys)
