"""The command line: bad input ends in one line and exit code 2; an official checkpoint is imported and evaluated."""

import json
import re

import numpy as np
import pytest

from tests.parity.golden import TRAINED_CASES, load_case
from ttt_e2e.cli import main
from ttt_e2e.config import default_config, from_config_dict, to_dict
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, override


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code and the lines of stderr that are no progress bar."""

    def run_command(*argv):
        code = main(list(map(str, argv)))
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if line and "%|" not in line]

    return run_command


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """A config file for a tiny model on a token store of random text; ARG "bad" has a mistyped field."""
    directory = tmp_path_factory.mktemp("config")
    writer = TokenWriter(directory / "store", "train", 50)
    writer.append(np.random.default_rng(0).integers(0, 50, 100))
    writer.close()
    write_attributes(directory / "store", {})
    path = directory / "config.py"
    path.write_text(
        f"""
from ttt_e2e.config import default_config

def get_config(arg=""):
    config = default_config()
    config.model.update(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_fast_blocks=1)
    config.model.sliding_window = 8
    config.inner.mini_batch_size = 8
    config.train.update(seq_len=16, global_batch_size=8, num_steps=2)
    config.optimizer.warmup_steps = 1
    config.data.path = {str(directory / "store")!r}
    config.data.eval_split = "train"
    if arg == "bad":
        config.model.hiden_size = 3
    return config
"""
    )
    return path


# Command line (CONFIG stands for the config file, DIR for an empty directory) -> what the one line must say.
BAD_INPUT = {
    "trian": "unknown command 'trian': did you mean 'train'",
    "train --confg=x": "unknown flag --confg: did you mean 'config'",
    "train run": "unexpected argument 'run'",
    "train --config=CONFIG": "--workdir is missing",
    "train --workdir=DIR/run": "workdir DIR/run holds no run",
    "train --config=DIR/no.py --workdir=DIR/run": "config file DIR/no.py does not exist",
    "train --config=CONFIG:bad --workdir=DIR/run": "config file CONFIG:bad: .*hiden_size",
    "train --config=CONFIG --config.model.hiden_size=3": "config.model.hiden_size: did you mean 'model.hidden_size'",
    "train --config=CONFIG --config.model.hidden_size": "config.model.hidden_size has no value",
    "train --config=CONFIG --config.model.hidden_size=3,4": "config.model.hidden_size=3,4",
    "train --config=CONFIG --config.model.hidden_size=wide": "config.model.hidden_size=wide",
    "train --config=CONFIG --config.inner.learning_rate=nan": "config.inner.learning_rate is nan",
    "train --config=CONFIG --config.train.seq_len=20": "seq_len is 20.* multiple of config.inner.mini_batch_size 8",
    "train --config=CONFIG --config.model.sliding_window=-1": "sliding_window is -1.* at least 0",
    "train --config=CONFIG --config.inner.mini_batch_size=0": "mini_batch_size is 0.* at least 1",
    "train --config=CONFIG --config.model.num_fast_blocks=3": "num_fast_blocks is 3.* at most num_hidden_layers 2",
    "train --config=CONFIG --config.model.num_attention_heads=3": "heads is 3.* divisor of hidden_size 16",
    "train --config=CONFIG --config.train.global_batch_size=3": "global_batch_size is 3.* multiple of 8",
    "train --config=CONFIG --config.data.path=DIR/no": "DIR/no: no token store there",
    "train --config=CONFIG --config.data.path=": "config.data.path is ''",
    "train --config=CONFIG --config.data.train_split=test": "test.*train",
    "train --config=CONFIG --config.train.seq_len=800": "has 100 tokens.* seq_len <= 99",
    "train --config=CONFIG --config.model.vocab_size=20 --config.log.every_steps=1": "vocab_size 20|below 20|20 ",
    "train --config=CONFIG --config.train.init_from=DIR/no": "checkpoint DIR/no does not exist",
    "evaluate --config=CONFIG --checkpoint=DIR/no --output=DIR/out": "checkpoint DIR/no does not exist",
    "evaluate --config=CONFIG --checkpoint=DIR --output=DIR/out": "checkpoint DIR holds no complete step",
    "evaluate --config=CONFIG --output=DIR/out": "--checkpoint is missing",
    "evaluate --workdir=DIR/run": "workdir DIR/run holds no run",
    "import --source=offical --config=CONFIG": "--source=offical",
    "import --source=official --config=CONFIG --checkpoint=DIR --output=DIR/out": "DIR holds no `model_weights`",
    "prepare --input=DIR/no --tokenizer=bytes --output=DIR/out": "DIR/no.*no document",
    "prepare --input=DIR --tokenizer=bytes --output=DIR/out": "DIR.*no document",
    "prepare --input=DIR --tokenizer=letters --output=DIR/out": "letters",
    "prepare --tokenizer=bytes --output=DIR/out": "--input is missing: .*repeated.$",
    "prepare --merge=DIR/a,DIR/b --output=DIR/out": "DIR/a: no token store there",
    "prepare --merge=DIR/a --input=DIR --output=DIR/out": "--merge takes the stores of parts, and no --input",
    "report --workdirs=DIR --output=DIR/out": "DIR.*config.json",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(command, run, config_file, tmp_path):
    def fill(text):
        return text.replace("CONFIG", str(config_file)).replace("DIR", str(tmp_path))

    arguments = fill(command).split()
    if "CONFIG --config" in command:
        arguments.append(f"--workdir={tmp_path}/run")
    code, lines = run(*arguments)
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert re.search(fill(BAD_INPUT[command]), lines[0])
    if "init_from" not in command and "vocab_size=20" not in command:  # these fail after the run directory is claimed
        assert list(tmp_path.iterdir()) == []


def test_help_lists_commands_and_flags(run, capsys):
    assert main(["--help"]) == 0
    assert "prepare" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    assert "--config" in capsys.readouterr().out


def case_config_file(case, path) -> str:
    """A config file that gives a golden case's config, with all of its sequences evaluated at once."""
    fields = to_dict(case.config)
    fields["data"] |= {"eval_split": "train"}
    fields["eval"] |= {"batch_size": len(case.tokens)}
    fields["mesh"] |= {"data": 1}
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({fields!r})\n")
    return str(path)


@pytest.mark.parametrize("name", TRAINED_CASES)
def test_an_official_checkpoint_imported_and_evaluated_gives_its_token_nll(name, run, tmp_path):
    case = load_case(name)
    config = case_config_file(case, tmp_path / "config.py")
    weights = case.path / "checkpoint"
    imported, out = tmp_path / "imported", tmp_path / "out"
    code, _ = run(
        "import", "--source=official", f"--config={config}", f"--checkpoint={weights}", f"--output={imported}"
    )
    assert code == 0
    code, _ = run("evaluate", f"--config={config}", f"--checkpoint={imported}", f"--output={out}")
    assert code == 0
    token_nll = np.load(out / "token_nll.npy")
    assert token_nll.dtype == np.float32
    np.testing.assert_allclose(token_nll, case.expected["token_nll"], rtol=0, atol=1e-5)
    metrics = json.loads((out / "metrics.json").read_text())
    np.testing.assert_allclose(metrics["loss"], case.expected["loss"].mean(), rtol=0, atol=1e-5)
    is_target = case.tokens[:, 1:] != case.config.data.bos_id
    assert metrics["num_tokens"] == is_target.sum()
    np.testing.assert_allclose(metrics["token_loss"], token_nll[is_target].mean(), rtol=1e-6)
    assert ("loss_without_learning" in metrics) == bool(case.config.model.num_fast_blocks)


@pytest.mark.parametrize(
    ("override", "message"),
    (
        (
            "--config.model.hidden_size=48",
            r"' is \(.*32.*\) in the checkpoint, but config.model makes it \(.*48.*\)",
        ),
        ("--config.model.tie_word_embeddings=false", r"'language_model.lm_head.weight' is not in the checkpoint"),
        ("--config.model.num_fast_blocks=0", "no place for these parameters of the checkpoint: .*prime"),
        ("--config.model.engram.blocks=0", "makes a parameter 'slow.prefix_0.*', but the released implementation has"),
        ("--config.model.attention_bias=true", "makes a parameter 'slow.prefix.attention.bk', but the released"),
    ),
)
def test_an_official_checkpoint_of_another_shape_is_refused(override, message, run, tmp_path):
    case = load_case("e2e_tied")
    config = case_config_file(case, tmp_path / "config.py")
    arguments = (f"--config={config}", f"--checkpoint={case.path / 'checkpoint'}", f"--output={tmp_path / 'out'}")
    code, lines = run("import", "--source=official", *arguments, override)
    assert code == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_documented_sections():
    sections = "model inner train optimizer data mesh checkpoint log eval"
    assert set(default_config()) == set(sections.split())


FORMS = {
    "config": "config",
    "a frozen one": "FrozenConfigDict(config)",
    "a frozen section": "config.unlock() or config.update(model=FrozenConfigDict(config.model)) or config",
    "a dict": "config.to_dict()",
    "some sections": "{'model': {'hidden_size': 64}, 'data': FrozenConfigDict({'bos_id': 7})}",
    "a Config": "from_config_dict(config)",
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_config_file_may_return(form, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        f"""
from ml_collections import FrozenConfigDict
from ttt_e2e.config import default_config, from_config_dict

def get_config():
    config = default_config()
    config.model.hidden_size, config.data.bos_id = 64, 7
    return {FORMS[form]}
"""
    )
    config = override(load_config_file(str(path)), ["--config.model.num_hidden_layers=2"])
    assert (config.model.hidden_size, config.data.bos_id, config.model.num_hidden_layers) == (64, 7, 2)


NO_CONFIGS = {
    "None": "get_config.. gives NoneType, but it takes a ConfigDict",
    "[1]": "get_config.. gives list, but",
    "Config": "get_config.. gives type, but",
    "Config().model": "get_config.. gives ModelConfig, but",
    "{'model.hidden_size': 64}": "dots",
    "{'modell': {}}": "config has no section 'modell': did you mean 'model'",
    "{'model': 64}": "config.model is 64, but it is a section",
    "{'model': {'hiden_size': 64}}": "config.model has no field 'hiden_size': did you mean 'hidden_size'",
    "{'model': {'hidden_size': None}}": "config.model.hidden_size is None",
}


@pytest.mark.parametrize("returned", NO_CONFIGS)
def test_what_it_may_not_return_is_one_line(returned, run, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"from ttt_e2e.config import Config\n\ndef get_config():\n    return {returned}\n")
    code, [line] = run("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and re.search(NO_CONFIGS[returned], line)
    assert not (tmp_path / "run").exists()


def test_the_config_of_a_run_is_a_config_file(tmp_path):
    path = tmp_path / "config.json"
    config = from_config_dict({"model": {"hidden_size": 64}})
    path.write_text(json.dumps(to_dict(config)))
    assert override(load_config_file(str(path)), []) == config
    assert "engram" not in to_dict(config)["model"]
    more = ["--config.model.engram.blocks=1", "--config.model.mamba2.chunk_size=8", "--config.model.mixer=mamba2"]
    model = override(load_config_file(str(path)), more).model
    assert model.engram.blocks == "1" and model.section("mamba2").chunk_size == 8
    for content, message in (
        ("{", "is not readable JSON"),
        ('{"model": {"width": 3}}', "config.model has no field 'width'"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            load_config_file(str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_config_file(str(tmp_path / "other.json"))
