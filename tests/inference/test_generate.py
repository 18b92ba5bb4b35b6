"""What is generated is what the model says: recomputed without caches, and scored again by the inner loop."""

import contextlib
import json
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.inference.conftest import assert_same_state, read_at_once, some_tokens
from tests.inner.conftest import BOS, b
from tests.model import naive
from ttt_e2e.checkpoints.params import save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.cli import main
from ttt_e2e.config import from_config_dict, to_dict
from ttt_e2e.data.tokenizers import ByteTokenizer
from ttt_e2e.errors import DivergedError
from ttt_e2e.inference import generate
from ttt_e2e.inference.generate import Settings, Token, _check_finite, generate_tokens, newest_tokens
from ttt_e2e.inference.settings import Sampling
from ttt_e2e.model import Transformer
from ttt_e2e.model.parameters import split

PROMPT = np.array([5, 9, 13, 2, 21, 8])
GREEDY = Sampling(temperature=0)
KEY = jax.random.key(0)


def continued(reader, settings, ids=PROMPT, bos_id=BOS, key=KEY):
    """The tokens generated after BOS and `ids`, and their NLL; the state before them and after."""
    before, _ = reader.read(reader.start(BOS), ids[None], learn=settings.learn != "none")
    tokens = list(generate_tokens(reader, before, ids, settings, key, {bos_id}))
    return [t.id for t in tokens], [t.nll for t in tokens], before, tokens[-1].state


@pytest.mark.usefixtures("float64")
def test_greedy_without_learning_equals_argmax_over_full_recomputation(model, reader):
    count, V = 3 * b, model.config.model.vocab_size

    @jax.jit
    def nll_of_every_next(tokens_T, t):
        """NLL [V] of each token of the vocabulary at position t, by the naive network over all of the text."""
        candidates = jax.vmap(lambda v: tokens_T.at[t].set(v))(jnp.arange(V))
        plain = jax.vmap(lambda tokens: naive.plain_nll(model.params, model.config.model, tokens, [6] * 3))
        return plain(candidates)[:, t - 1]

    text_T = jnp.zeros(1 + len(PROMPT) + count, int).at[: 1 + len(PROMPT)].set(jnp.array([BOS, *PROMPT]))
    for t in range(1 + len(PROMPT), len(text_T)):
        text_T = text_T.at[t].set(jnp.argmin(nll_of_every_next(text_T, t)))
    tokens, _, _, _ = continued(reader, Settings(count, GREEDY, learn="none"), bos_id=-1)
    assert tokens == list(map(int, text_T[1 + len(PROMPT) :]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("learn", ["all", "none"])
def test_generated_text_scored_again_has_the_nll_that_generation_saw(model, reader, learn):
    settings = Settings(4 * b - len(PROMPT), Sampling(temperature=1.5, repetition_penalty=1.1), learn=learn)
    tokens, nlls, _, after = continued(reader, settings, bos_id=-1)
    text = np.array([[BOS, *PROMPT, *tokens]])
    if learn == "all":
        reading = read_at_once(model, text)
        assert_same_state(after.fast, reading.fast, rtol=1e-9, atol=1e-11)
        expected = reading.token_nll_T[0]
    else:
        expected = naive.plain_nll(model.params, model.config.model, text[0], [6] * 3)
        assert_same_state(after.fast, reader.start(BOS).fast)
    np.testing.assert_allclose(nlls, expected[len(PROMPT) :], rtol=1e-8)


@pytest.mark.usefixtures("float64")
def test_learning_from_the_prompt_stops_with_it(reader):
    _, _, before, after = continued(reader, Settings(3 * b, learn="prompt"), bos_id=-1)
    assert_same_state(after.fast, before.fast)
    assert np.any(before.fast["suffix"]["fast_mlp"]["w1"] != reader.start(BOS).fast["suffix"]["fast_mlp"]["w1"])


@pytest.mark.usefixtures("float64")
def test_the_newest_tokens_are_the_last_that_were_read(reader):
    """Of the unfinished mini-batch, and the newest where none is begun."""
    tokens_BT1 = some_tokens(1, 2 * reader.mini_batch_size)
    for count in range(reader.mini_batch_size + 2):
        state, _ = reader.read(reader.start(tokens_BT1[:, 0]), tokens_BT1[:, 1 : count + 1])
        newest = newest_tokens(state)
        assert 1 <= len(newest) <= reader.mini_batch_size
        np.testing.assert_array_equal(newest, tokens_BT1[0, : count + 1][-len(newest) :])


def test_seeds_reproduce_and_differ(reader):
    settings = Settings(10)
    first, again = (continued(reader, settings, bos_id=-1)[0] for _ in range(2))
    assert first == again
    others = [continued(reader, settings, bos_id=-1, key=jax.random.key(seed))[0] for seed in (1, 2)]
    assert len(set(map(tuple, [first, *others]))) == 3


@pytest.mark.usefixtures("float64")
def test_ends_with_bos(reader):
    free, _, _, _ = continued(reader, Settings(10), bos_id=-1)
    stop_id = free[4]
    tokens, _, _, _ = continued(reader, Settings(10), bos_id=stop_id)
    assert tokens == free[: free.index(stop_id) + 1]


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Flags of a tiny byte model: a config file and a checkpoint of random parameters."""
    directory = tmp_path_factory.mktemp("model")
    model = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    model |= {"num_attention_heads": 2, "num_fast_blocks": 1, "sliding_window": 8, "initializer_range": 0.3}
    config = from_config_dict(
        {
            "model": model,
            "inner": {"mini_batch_size": 8},
            "train": {"seq_len": 16},
            "data": {"tokenizer": "bytes", "bos_id": 256},
        }
    )
    _, fast, slow = split(Transformer(config.model, nnx.Rngs(0)))
    save_params(directory / "checkpoint", {"fast": fast, "slow": slow}, progress_of(0, 0, config))
    path = directory / "config.py"
    fields = to_dict(config)
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({fields!r})\n")
    return [f"--config={path}", f"--checkpoint={directory / 'checkpoint'}"]


@pytest.fixture
def run(checkpoint, capsys):
    """Runs `generate`; returns its exit code, stdout, and the lines of stderr that are no progress bar."""

    def run_command(*flags):
        code = main(["generate", *checkpoint, *map(str, flags)])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line and "token/s" not in line and "it/s" not in line]

    return run_command


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_streams_one_prompt_and_writes_its_result(run, tmp_path):
    code, out, _ = run("--prompt=the cat", "--max_new_tokens=12", f"--output={tmp_path / 'out.jsonl'}", "--seed=3")
    (result,) = results(tmp_path / "out.jsonl")
    assert code == 0
    assert out == result["text"] + "\n"
    assert result["prompt"] == "the cat"
    assert result["text"] == ByteTokenizer().decode(result["tokens"])
    assert len(result["tokens"]) == len(result["nll"]) <= 12


def test_prompts_of_different_lengths_do_not_depend_on_each_other(run, tmp_path):
    prompts = ["the cat", "", "a longer one, of more than a mini-batch"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    code, out, _ = run(f"--prompt_file={file}", "--max_new_tokens=9", "--temperature=0")
    together = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [result["prompt"] for result in together] == prompts
    for prompt, result in zip(prompts[1:], together[1:]):
        run(f"--prompt={prompt}", "--max_new_tokens=9", "--temperature=0", f"--output={tmp_path / 'one.jsonl'}")
        (alone,) = results(tmp_path / "one.jsonl")
        assert alone == result


def test_going_on_from_a_saved_state_is_going_on(run, tmp_path):
    """A text read in two processes, the second of which generates."""
    text, out = "some text of more than one mini-batch", tmp_path / "out.jsonl"
    flags = ("--max_new_tokens=8", "--temperature=0", f"--output={out}")
    assert run(f"--prompt={text}", *flags)[0] == 0
    code, printed, _ = run(f"--prompt={text[:21]}", "--max_new_tokens=0", f"--save_state={tmp_path / 'state'}")
    assert (code, printed) == (0, "")
    (whole,) = results(out)
    assert run(f"--load_state={tmp_path / 'state'}", f"--prompt={text[21:]}", *flags)[0] == 0
    (halves,) = results(out)
    assert halves["tokens"] == whole["tokens"]
    np.testing.assert_allclose(halves["nll"], whole["nll"], rtol=1e-4)  # float32, read in other pieces


def test_stops_before_a_stop_string(run, tmp_path):
    flags = ("--prompt=x", "--max_new_tokens=30", "--seed=5", "--temperature=0.5", f"--output={tmp_path / 'out.jsonl'}")
    run(*flags)
    (free,) = results(tmp_path / "out.jsonl")
    stop = free["text"][2:4]
    code, out, _ = run(*flags, f"--stop={stop}", "--stop=never this")
    (result,) = results(tmp_path / "out.jsonl")
    assert code == 0
    assert result["ended_by"] == "stop"
    assert out == result["text"] + "\n" == free["text"][: free["text"].index(stop)] + "\n"


def test_ends_with_the_tokenizer_s_eos(run, tmp_path, monkeypatch):
    flags = ("--prompt=x", "--max_new_tokens=8", "--seed=5", f"--output={tmp_path / 'out.jsonl'}")
    run(*flags)
    (free,) = results(tmp_path / "out.jsonl")
    monkeypatch.setattr(ByteTokenizer, "eos_id", free["tokens"][3])
    run(*flags)
    (result,) = results(tmp_path / "out.jsonl")
    assert result["ended_by"] == "eos"
    assert result["tokens"] == free["tokens"][: free["tokens"].index(ByteTokenizer.eos_id) + 1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(run):
    code, _, lines = run("--prompt=x", "--max_new_tokens=2", "--output=/dev/full")
    assert code == 2
    assert lines[-1] == "error: output /dev/full cannot be written (No space left on device)"


def test_full_attention_has_as_much_room_as_is_needed_or_declared(run):
    """A model of one block, whose parameters serve full attention as well."""
    full = ("--config.model.sliding_window=0", "--prompt=abc", "--max_new_tokens=3")
    assert run(*full)[0] == 0
    code, out, lines = run(*full, "--max_length=5")
    assert (code, out) == (2, "")
    assert "max_length is 5, but 0 tokens were read and 6 more are to come" in lines[0]


# ------------------------------------------------------------------------------------------------------- the reader


@contextlib.contextmanager
def unread():
    """Standard output is a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, contextlib.redirect_stdout(stream):
        yield


def test_what_is_written_into_files_is_written_though_nobody_reads_the_text(checkpoint, tmp_path):
    files = (f"--output={tmp_path / 'out.jsonl'}", f"--save_state={tmp_path / 'state'}")
    with unread():
        assert main(["generate", *checkpoint, "--prompt=the cat", "--max_new_tokens=12", "--seed=3", *files]) == 0
    assert len(results(tmp_path / "out.jsonl")[0]["tokens"]) == 12
    assert (tmp_path / "state").is_dir()


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_what_nobody_reads_is_not_generated(num_prompts, checkpoint, tmp_path, monkeypatch):
    """A single prompt ends with its first token, several with the first of them."""
    counts = []

    def generate_tokens(*arguments):
        for _ in range(9):
            counts.append(1)
            yield Token(97, 0.0, None)

    monkeypatch.setattr(generate, "generate_tokens", generate_tokens)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat"}\n' * num_prompts)
    prompts = f"--prompt_file={tmp_path / 'prompts.jsonl'}"
    with unread():
        assert main(["generate", *checkpoint, prompts, "--max_new_tokens=9"]) == 0
    assert len(counts) == (1 if num_prompts == 1 else 9)


# ------------------------------------------------------------------------------------------------------- divergence

# Of a learning rate that is far too high. After the first inner step, of 8 tokens, products of weights are infinite.
DIVERGING = ("--config.inner.learning_rate=9e18", "--seed=3")


def test_generation_ends_where_the_model_diverges(run, tmp_path):
    flags = (*DIVERGING, "--prompt=abc", "--max_new_tokens=30", f"--output={tmp_path / 'out.jsonl'}")
    code, out, lines = run(*flags, f"--save_state={tmp_path / 'state'}")
    text = (tmp_path / "out.jsonl").read_text()
    result = json.loads(text)
    assert code == 1
    error = f"error: the NLL of generated token 6 is nan; no state is saved in {tmp_path / 'state'}"
    assert [line for line in lines if line.startswith("error")] == [error]
    assert (len(result["tokens"]), result["ended_by"], "NaN" in text) == (5, "diverged", False)
    assert out == result["text"] + "\n" and not (tmp_path / "state").exists()


def test_a_prompt_in_which_the_model_diverges_is_not_continued(run, tmp_path):
    prompts = ["abc", "a prompt of more than a mini-batch"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    code, out, lines = run(*DIVERGING, f"--prompt_file={tmp_path / 'prompts.jsonl'}", "--max_new_tokens=3")
    first, second = map(json.loads, out.splitlines())
    assert code == 1 and "error: prompt 2: the NLL of token 9 of the prompt is nan" in lines
    assert first["ended_by"] != "diverged" and first["tokens"]
    assert second == {"prompt": prompts[1], "text": "", "tokens": [], "nll": [], "ended_by": "diverged"}


def test_fast_weights_that_diverged_in_the_last_step_are_not_saved():
    """No NLL has shown it yet."""
    for number in (np.nan, np.inf):
        state = SimpleNamespace(fast={"w1": jnp.ones(3), "w2": jnp.array([0, number])}, position=8)
        _check_finite(state, [], "")
        with pytest.raises(
            DivergedError, match="a fast weight is NaN or infinite after 8 tokens; no state is saved in x"
        ):
            _check_finite(state, [], "x")
    _check_finite(SimpleNamespace(fast={"w1": jnp.ones(3)}, position=8), [], "x")


# Flags (DIR stands for an empty directory) -> what the one line must say.
BAD_INPUT = {
    "--max_new_tokens=0": "max_new_tokens is 0, but it must be at least 1",
    "--max_new_tokens=-1": "max_new_tokens is -1",
    "--max_new_tokens=two": "max_new_tokens.*two",
    "--temperature=nan": "temperature is nan, but it must be a finite number",
    "--top_p=0": "top_p is 0.0",
    "--learn=some": "learn is 'some', but it must be one of all, prompt, none",
    "--seed=-1": "seed is -1",
    "--stop=": "stop is ''",
    "--prompt=a --prompt_file=b": "--prompt and --prompt_file are both given",
    "--prompt_file=DIR/no": "prompt_file DIR/no cannot be read",
    "--prompt=\udcff": "prompt has at character 0 a byte that is no UTF-8",
    "--load_state=DIR/no": "DIR/no holds no saved state",
    "--save_state=DIR": "DIR already exists",
    "--save_state=DIR/state --precision=int8": "precision is 'int8'",
    "--config.data.tokenizer=DIR/no.model": "config.data.tokenizer is 'DIR/no.model'",
    "--config.data.tokenizer=": "config.data.tokenizer is ''",
    "--config.model.vocab_size=300": "'slow.embedding'.*300",
    "--config.model.vocab_size=200 --config.data.bos_id=0": "vocab_size is 200, but tokenizer bytes has 257",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(flags, run, tmp_path):
    code, out, lines = run(*(flag.replace("DIR", str(tmp_path)) for flag in flags.split(" ")))
    assert (code, out) == (2, "")
    assert len(lines) == 1, lines
    assert re.search("^error: .*" + BAD_INPUT[flags].replace("DIR", str(tmp_path)), lines[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ok \xff", "is no UTF-8 text: byte 0xff at 3"),
        (b"", "has no line"),
        (b'{"prompt": "a"}\n{"text": "b"}', "line 2: expected a JSON object with a string in the field 'prompt'"),
        (b'{"prompt": "a"}\n["prompt"]', "line 2: expected"),
        (b"{", "line 1: expected"),
    ],
)
def test_bad_prompt_files_are_one_line(content, message, run, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(content)
    code, _, lines = run(f"--prompt_file={tmp_path / 'prompts.jsonl'}")
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_state_takes_a_single_prompt(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 2)
    code, _, lines = run(f"--prompt_file={tmp_path / 'prompts.jsonl'}", f"--save_state={tmp_path / 'state'}")
    assert code == 2
    assert "takes a single prompt, but there are 2" in lines[0]


def test_a_state_of_another_model_or_mini_batch_size_is_refused(run, tmp_path):
    state = tmp_path / "state"
    assert run("--prompt=some text", "--max_new_tokens=0", f"--save_state={state}")[0] == 0
    for override, message in {
        "--config.inner.mini_batch_size=4": "was made with config.inner.mini_batch_size 8; here it is 4",
        "--config.model.sliding_window=4": "belongs to a model whose model.sliding_window is 8; here it is 4",
    }.items():
        code, out, lines = run("--prompt=a", f"--load_state={state}", override)
        assert (code, out, len(lines)) == (2, "", 1)
        assert message in lines[0]
