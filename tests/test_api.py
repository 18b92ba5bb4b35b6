"""From Python: the same values as the commands give, nothing on stdout, and one line for a user's mistake."""

import asyncio
import json
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import ttt_e2e
from tests.evaluation.conftest import BOS, T, make_run, write_store
from tests.inference.conftest import assert_same_state
from tests.tiny_run import tiny_run
from ttt_e2e.cli import main
from ttt_e2e.config import Config, to_dict
from ttt_e2e.train.batches import open_store

TEXT = "some text of more than one mini-batch, in which words come again: words of some text"
ROUNDING = {"rtol": 0, "atol": 1e-5}  # float32, computed in other pieces


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a byte model with random parameters, and the store that it is evaluated on."""
    directory = tmp_path_factory.mktemp("api")
    write_store(directory / "store")
    return make_run(directory / "run", directory / "store")


@pytest.fixture(scope="module")
def model(workdir):
    return ttt_e2e.load(workdir)


@pytest.fixture(autouse=True)
def nothing_on_stdout(capsys):
    """No function of the package prints; the commands that are compared with do, and their tests read it."""
    yield
    assert capsys.readouterr().out == ""


def test_importing_the_package_is_cheap():
    """JAX takes seconds to import, as does what needs it: they come when they are used."""
    code = (
        "import sys, ttt_e2e; ttt_e2e.UserError, ttt_e2e.__version__, dir(ttt_e2e);"
        "heavy = {'jax', 'numpy', 'absl', 'ml_collections', 'ttt_e2e.api'} & set(sys.modules); assert not heavy, heavy;"
        "ttt_e2e.train; assert 'jax' not in sys.modules;"
        "ttt_e2e.load; assert 'jax' in sys.modules; from ttt_e2e import *; assert Model is ttt_e2e.Model"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_there_is_no_other_attribute():
    assert set(ttt_e2e.__all__) <= set(dir(ttt_e2e))
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ttt_e2e.lod  # noqa: B018


# ------------------------------------------------------------------------------------------------- reading


def test_nll_is_what_evaluate_gives_for_the_same_sequence(model, workdir, tmp_path):
    result = ttt_e2e.evaluate(workdir, {"eval.num_sequences": 2}, output=tmp_path)
    assert result["num_sequences"] == 2 and result["output"] == str(tmp_path)
    first = open_store(model.config, "val").sequences([0], T)[0]
    assert first[0] == BOS
    text = model.tokenizer.decode(first[1:])
    for learn, name in ((True, "token_nll"), (False, "token_nll_without_learning")):
        nll = model.nll(text, learn=learn)
        assert (nll.dtype, nll.shape) == (np.float32, (T,))
        expected = np.load(tmp_path / f"{name}.npy")[0]
        np.testing.assert_allclose(nll, expected, **ROUNDING)
        np.testing.assert_array_equal(nll, model.nll(first[1:].tolist(), learn=learn))
    assert np.abs(model.nll(text) - nll).max() > 1e-3  # so that the one cannot pass for the other


def test_not_learning_is_an_inner_rate_of_0(model, workdir):
    static = ttt_e2e.load(workdir, {"inner.learning_rate": 0})
    np.testing.assert_allclose(static.nll(TEXT), model.nll(TEXT, learn=False), **ROUNDING)
    assert static.generate(TEXT, max_new_tokens=9) == model.generate(TEXT, max_new_tokens=9, learn="none")
    assert_same_state(model.read(TEXT, learn=False).fast, model.read("").fast)


@pytest.mark.parametrize("cut", [1, 21, 32])
def test_a_text_read_in_two_pieces_is_read(model, cut):
    half = model.read(TEXT[:cut])
    again = model.read(TEXT[:cut])
    assert_same_state(model.read(TEXT[cut:], state=half), model.read(TEXT))
    assert_same_state(half, again)  # a state is a value: going on from it leaves it as it was
    assert half.position == cut and str(half) == f"ReaderState(position={cut})"
    halves = np.concatenate([model.nll(TEXT[:cut]), model.nll(TEXT[cut:], state=half)])
    np.testing.assert_allclose(halves, model.nll(TEXT), **ROUNDING)


def test_a_saved_state_is_the_same_to_the_bit(model, tmp_path, workdir):
    state = model.read(TEXT)
    model.save(state, tmp_path / "state")
    assert_same_state(model.load_state(tmp_path / "state"), state)
    assert_same_state(ttt_e2e.load(workdir).load_state(str(tmp_path / "state")), state)
    model.save(state, tmp_path / "rounded", precision="bfloat16")
    with pytest.raises(AssertionError):
        assert_same_state(model.load_state(tmp_path / "rounded"), state)


def test_it_works_where_an_event_loop_runs(workdir, tmp_path):
    """As it does in a cell of a notebook; Orbax saves and restores by coroutines."""

    async def cell():
        model = ttt_e2e.load(workdir)
        state = model.read("abc")
        model.save(state, tmp_path / "state")
        assert_same_state(model.load_state(tmp_path / "state"), state)

    asyncio.run(cell())


def test_full_attention_has_room_for_any_text(tmp_path, workdir):
    full = ttt_e2e.load(make_run(tmp_path / "full", workdir.parent / "store", sliding_window=0))
    state = full.read(TEXT)
    assert len(full.generate(state=state, max_new_tokens=3).tokens) <= 3
    full.save(state, tmp_path / "state")
    assert_same_state(full.load_state(tmp_path / "state"), state)


# ---------------------------------------------------------------------------------------------- generating


def command(workdir, capsys, *flags) -> str:
    """What the command `generate` prints."""
    assert main(["generate", f"--workdir={workdir}", *map(str, flags)]) == 0
    return capsys.readouterr().out


def test_generate_is_what_the_command_prints(model, workdir, capsys, tmp_path):
    greedy = model.generate(TEXT, max_new_tokens=20, temperature=0)
    flags = ("--max_new_tokens=20", "--temperature=0", f"--output={tmp_path / 'out.jsonl'}")
    assert command(workdir, capsys, f"--prompt={TEXT}", *flags) == greedy + "\n"
    result = json.loads((tmp_path / "out.jsonl").read_text())
    assert greedy.tokens.tolist() == result["tokens"] and greedy.ended_by == result["ended_by"]
    np.testing.assert_array_equal(greedy.nll, np.float32(result["nll"]))
    # With everything drawn, and from a state that either of them has saved.
    drawn = {"max_new_tokens": 12, "temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 3, "learn": "prompt"}
    flags = [f"--{name}={value}" for name, value in (drawn | {"repetition_penalty": 1.1}).items()]
    model.save(model.read(TEXT), tmp_path / "ours")
    command(workdir, capsys, f"--prompt={TEXT}", "--max_new_tokens=0", f"--save_state={tmp_path / 'theirs'}")
    text = model.generate("x", state=model.load_state(tmp_path / "theirs"), repetition_penalty=1.1, **drawn)
    assert command(workdir, capsys, "--prompt=x", f"--load_state={tmp_path / 'ours'}", *flags) == text + "\n"
    assert text != model.generate("x", state=model.read(TEXT), **drawn | {"seed": 4})


def test_reading_before_generating_is_a_longer_prompt(model):
    whole = model.generate(TEXT, max_new_tokens=20, temperature=0)
    after = model.generate(TEXT[50:], state=model.read(TEXT[:50]), max_new_tokens=20, temperature=0)
    assert after == whole
    assert_same_state(after.state, whole.state)
    assert after.state.position == len(TEXT) + len(after.tokens)
    assert whole != model.generate(TEXT[50:], max_new_tokens=20, temperature=0)
    nll = model.nll(whole.tokens, state=model.read(TEXT))
    np.testing.assert_allclose(nll, whole.nll, **ROUNDING)


def test_a_stop_string_may_be_given_alone(model):
    free = model.generate("x", max_new_tokens=30, temperature=0.5, seed=5)
    stop = free[2:4]
    for given in (stop, [stop, "never this"]):
        stopped = model.generate("x", max_new_tokens=30, temperature=0.5, seed=5, stop=given)
        assert stopped == free[: free.index(stop)] and stopped.ended_by == "stop"


def test_progress_is_hidden_unless_asked_for(model, workdir, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("ttt_e2e.progress.on_terminal", lambda: True)
    model.generate(TEXT, max_new_tokens=2)
    for progress in (False, True):
        ttt_e2e.evaluate(workdir, {"eval.num_sequences": 2}, output=tmp_path, progress=progress)
        assert ("evaluate: 100%" in capsys.readouterr().err) == progress


# ----------------------------------------------------------------------------------- configs, training, evaluating


def test_a_config_may_be_named_in_every_way(workdir, tmp_path):
    config = ttt_e2e.load_config(workdir)
    assert isinstance(config, Config) and config.train.seq_len == T
    given = ConfigDict(to_dict(config))
    (tmp_path / "config.py").write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({to_dict(config)!r})\n"
    )
    names = [config, given, f"{workdir}/config.json", workdir / "checkpoints" / "0", tmp_path / "config.py"]
    for name in names:
        assert ttt_e2e.load_config(name) == config
    overrides = {"train.seq_len": 64, "data.shuffle": False, "inner.learning_rate": 0.25, "data.tokenizer": "bytes"}
    changed = ttt_e2e.load_config(given, overrides)
    assert (changed.train.seq_len, changed.data.shuffle, changed.inner.learning_rate) == (64, False, 0.25)
    assert changed.data.tokenizer == "bytes"
    assert given.train.seq_len == T  # what was given is left as it was
    quickstart = ttt_e2e.load_config("configs/quickstart.py:window")
    assert quickstart.model.num_fast_blocks == 0


def test_train_is_the_command(token_store, tmp_path, capsys, monkeypatch):
    for module in ("ttt_e2e.train.step_log", "ttt_e2e.progress"):  # the first imports the name from the second
        monkeypatch.setattr(f"{module}.on_terminal", lambda: True)
    config = tiny_run(token_store)
    metrics = ttt_e2e.train(config, tmp_path / "run", {"train.num_steps": 2})
    assert np.isfinite(metrics["loss"]) and metrics["learning_rate"] > 0
    assert "train:" not in capsys.readouterr().err
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text())
    assert start["overrides"] == ["--config.train.num_steps=2"]
    resumed = ttt_e2e.train(tmp_path / "run", tmp_path / "run", {"train.num_steps": 3}, progress=True)
    assert resumed["loss"] != metrics["loss"]
    assert "train: 100%" in capsys.readouterr().err
    assert ttt_e2e.train(tmp_path / "run", tmp_path / "run") == {}  # nothing is left to do
    model = ttt_e2e.load(tmp_path / "run")
    assert model.nll([3, 4, 5]).shape == (3,)  # without any tokenizer, by ids
    assert ttt_e2e.train.loop.train is sys.modules["ttt_e2e.train.loop"].train  # it is a package, too


def test_evaluate_runs_what_its_keywords_select(workdir, capsys, tmp_path):
    settings = {"context_lengths": [16, 32], "num_stretches": 2}
    result = ttt_e2e.evaluate(workdir, output=tmp_path / "ours", **settings)
    flags = ("--context_lengths=16,32", "--num_stretches=2", f"--output={tmp_path / 'theirs'}")
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert result["context_lengths"] == printed["context_lengths"]
    assert result["context_lengths"]["num_stretches"] == 2
    for checkpoint, more in ((workdir, {}), (workdir / "checkpoints", {"config": workdir, "output": tmp_path / "at"})):
        where = ttt_e2e.evaluate(checkpoint, context_lengths=16, num_stretches=1, **more)["output"]
        assert where == str(more.get("output", workdir / "evaluation"))


MISTAKES = {
    "no run": (lambda m, w, d: ttt_e2e.load(d / "no"), "no is no run directory, and no checkpoint in one"),
    "no step": (lambda m, w, d: ttt_e2e.load(d, config=w), "holds no complete step"),
    "no field": (lambda m, w, d: ttt_e2e.load(w, {"inner.rate": 1}), "unknown config field config.inner.rate: "),
    "bad value": (lambda m, w, d: ttt_e2e.load(w, {"inner.learning_rate": "fast"}), "config.inner.learning_rate=fast"),
    "other shape": (
        lambda m, w, d: ttt_e2e.load(w, {"model.hidden_size": 32}),
        r"w1' is .*16.* in checkpoint .* the config makes it .*32",
    ),
    "no dict": (lambda m, w, d: ttt_e2e.load(w, ["--config.train.seq_len=8"]), "overrides is .* must be a dict such"),
    "no config": (lambda m, w, d: ttt_e2e.load_config("configs/no.py"), "config file configs/no.py does not exist"),
    "None": (lambda m, w, d: ttt_e2e.load_config(None), "config is None, but it must be a path"),
    "texts": (lambda m, w, d: m.nll(["a", "b"]), r"text is \['a', 'b'\], but it must be one string, or"),
    "an id": (lambda m, w, d: m.nll([5, 257]), "token id 257 is not below vocab_size 257"),
    "negative": (lambda m, w, d: m.read([-1]), "text has the token id -1"),
    "learn": (lambda m, w, d: m.read("a", learn="none"), "learn is 'none', but it must be True or False"),
    "generate learn": (lambda m, w, d: m.generate("a", learn=False), "learn is False, but it must be one of all, p"),
    "temperature": (lambda m, w, d: m.generate("a", temperature=-1), "temperature is -1, but it must be"),
    "stop": (lambda m, w, d: m.generate("a", stop=""), "stop is ''"),
    "a path as state": (lambda m, w, d: m.nll("a", state="states/a"), "state is 'states/a', but it must be one that"),
    "no state": (lambda m, w, d: m.save(None, d / "state"), "state is None"),
    "saved before": (lambda m, w, d: m.save(m.read("a"), d), "already exists"),
    "precision": (lambda m, w, d: m.save(m.read("a"), d / "state", precision="int8"), "precision is 'int8'"),
    "nothing saved": (lambda m, w, d: m.load_state(d), "holds no saved state"),
    "setting": (lambda m, w, d: ttt_e2e.evaluate(w, context_length=16), "no setting 'context_length': did you mean"),
    "its value": (lambda m, w, d: ttt_e2e.evaluate(w, context_lengths="a"), "context_lengths=a: it takes integers"),
    "its type": (lambda m, w, d: ttt_e2e.evaluate(w, needle=[1], needle_samples="x"), "needle_samples=x: "),
    "unselected": (lambda m, w, d: ttt_e2e.evaluate(w, num_stretches=1), "num_stretches belongs to --context_lengths"),
    "too long": (lambda m, w, d: ttt_e2e.evaluate(w, context_lengths=10**6), "context_lengths has 1000000, but split"),
    "no output": (lambda m, w, d: ttt_e2e.evaluate(w / "checkpoints"), "output is missing"),
    "no store": (lambda m, w, d: ttt_e2e.train(w, d / "run", {"data.path": "no"}), "no: no token store there"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(mistake, model, workdir, tmp_path):
    call, message = MISTAKES[mistake]
    with pytest.raises(ttt_e2e.UserError, match=message) as raised:
        call(model, workdir, tmp_path)
    assert len(str(raised.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_another_model_is_refused(model, workdir, tmp_path):
    wider = ttt_e2e.load(make_run(tmp_path / "wider", workdir.parent / "store", hidden_size=32, intermediate_size=32))
    with pytest.raises(ttt_e2e.UserError, match=r"state is ReaderState\(position=1\), but it must be one that"):
        model.generate("a", state=wider.read("b"))
    wider.save(wider.read("b"), tmp_path / "state")
    with pytest.raises(ttt_e2e.UserError, match=r"belongs to a model whose model.hidden_size is 32; here it is 16"):
        model.load_state(tmp_path / "state")
