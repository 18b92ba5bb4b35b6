"""Models of Hugging Face in and out: the numbers that transformers gives, and the files to the bit.

tests/data/huggingface has tiny models with random weights, norms and biases away from 1 and 0, and the logits that
transformers computed with them (float32).
"""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from tests.interop.directories import DATA, change_tensors, damaged, refused, safetensors
from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cli import main
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.data.tokenizers import file_digest
from ttt_e2e.inner import read_sequence
from ttt_e2e.interop import huggingface, huggingface_config
from ttt_e2e.interop.additions import Additions
from ttt_e2e.model import abstract_model
from ttt_e2e.model.parameters import merge
from ttt_e2e.runs.data_record import find_data_record
from ttt_e2e.runs.directory import load_config

CASES = sorted(path.name for path in DATA.iterdir())


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """{case: run directory}, through the command line."""
    runs = {}
    for case in CASES:
        runs[case] = tmp_path_factory.mktemp("imported") / case
        arguments = ["--source=huggingface", f"--checkpoint={DATA / case / 'model'}", f"--output={runs[case]}"]
        assert main(["import", *arguments]) == 0
    return runs


def load(run):
    config = load_config(run)
    graphdef, abstract = abstract_model(config.model)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(run, with_shardings(abstract, device))
    return config, merge(graphdef, params["fast"], params["slow"])


def logits(model, tokens_BT):
    run = jax.jit(jax.vmap(lambda tokens_T: model.logits(model.run_prefix(model.embed(tokens_T), tokens_T))))
    return run(tokens_BT)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, imported):
    _, model = load(imported[case])
    with np.load(DATA / case / "golden.npz") as golden:
        np.testing.assert_allclose(logits(model, golden["tokens"]), golden["logits"], rtol=0, atol=2e-4)


CONTROLS = {
    "llama3_scaled_rope": {"rope_scaling_factor": 0.0},
    "llama2_tied_mha": {"rope_style": "interleaved"},
    "qwen2_bias": {"rope_theta": 10_000.0},
    "qwen3_qk_norm": {"rms_norm_eps": 1e-2},
    "mistral_window": {"sliding_window": 17},
    "qwen3_hybrid_layers": {"mixer": "attention,window,window"},
}


@pytest.mark.parametrize("case", CASES)
def test_another_convention_is_seen(case, imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported[case], run)
    config = json.loads((run / "config.json").read_text())
    config["model"] |= CONTROLS[case]
    (run / "config.json").write_text(json.dumps(config))
    _, model = load(run)
    with np.load(DATA / case / "golden.npz") as golden:
        assert np.abs(logits(model, golden["tokens"]) - golden["logits"]).max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_nll_through_the_command_line(case, imported, tmp_path):
    with np.load(DATA / case / "golden.npz") as golden:
        tokens_T1, logits_T1V = golden["tokens"][0], golden["logits"][0]
    T = len(tokens_T1) - 1
    writer = TokenWriter(tmp_path / "store", "val", 96)
    writer.append(tokens_T1)
    writer.close()
    write_attributes(tmp_path / "store", {"vocab_size": 96})
    sizes = {"train.seq_len": T, "inner.mini_batch_size": T, "eval.batch_size": 1, "mesh.data": 1, "data.bos_id": 0}
    overrides = [f"--config.{name}={value}" for name, value in sizes.items()]
    overrides += [f"--config.data.path={tmp_path / 'store'}"]
    assert main(["evaluate", f"--workdir={imported[case]}", f"--output={tmp_path / 'out'}", *overrides]) == 0
    [nll_T] = np.load(tmp_path / "out" / "token_nll.npy")
    expected_TV = jax.nn.log_softmax(logits_T1V[:-1])
    np.testing.assert_allclose(nll_T, -expected_TV[np.arange(T), tokens_T1[1:]], rtol=0, atol=1e-4)


def tensors_of(directory) -> dict:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in safetensors.load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_exported_again_it_is_equal_to_the_bit(case, imported, tmp_path):
    arguments = ["--target=huggingface", f"--workdir={imported[case]}", f"--output={tmp_path / 'out'}"]
    assert main(["export", *arguments]) == 0
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(DATA / case / "model")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor)
    read = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", DATA / case / "model")]
    assert huggingface_config.to_model(read[0]) == huggingface_config.to_model(read[1])
    assert read[0]["model_type"] == read[1]["model_type"]


def test_several_files_where_one_would_be_large(imported, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.safetensors_files, "MAX_FILE_BYTES", 40_000)
    run = imported["llama3_scaled_rope"]
    huggingface.export_model(load_config(run), run, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    huggingface.import_model(tmp_path / "out", tmp_path / "run", [])
    _, model = load(tmp_path / "run")
    with np.load(DATA / "llama3_scaled_rope" / "golden.npz") as golden:
        np.testing.assert_allclose(logits(model, golden["tokens"]), golden["logits"], rtol=0, atol=2e-4)


def test_a_model_that_rotates_adjacent_pairs_is_exported_in_halves(imported, tmp_path):
    """The same logits from the reordered channels."""
    run = tmp_path / "run"
    shutil.copytree(imported["qwen3_qk_norm"], run)
    config = json.loads((run / "config.json").read_text())
    config["model"]["rope_style"] = "interleaved"
    (run / "config.json").write_text(json.dumps(config))
    _, model = load(run)
    huggingface.export_model(load_config(run), run, tmp_path / "out")
    huggingface.import_model(tmp_path / "out", tmp_path / "again", [])
    _, again = load(tmp_path / "again")
    tokens = np.random.default_rng(0).integers(0, 96, (1, 40))
    np.testing.assert_allclose(logits(again, tokens), logits(model, tokens), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- fast MLPs


@pytest.fixture(scope="module")
def with_fast_mlps(tmp_path_factory):
    run = tmp_path_factory.mktemp("fast") / "run"
    arguments = ["--source=huggingface", f"--checkpoint={DATA / 'qwen3_qk_norm' / 'model'}", f"--output={run}"]
    arguments += ["--num_fast_blocks=1", "--fast_intermediate_size=40", "--config.inner.mini_batch_size=8"]
    assert main(["import", *arguments, "--config.train.seq_len=64", "--config.data.bos_id=0"]) == 0
    return run


def readings(run, rates):
    """(token NLL [T] at each inner rate, the gradient of the loss at the last, parameters)."""
    config = load_config(run)
    graphdef, abstract = abstract_model(config.model)
    params = load_params(run, with_shardings(abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0])))
    tokens = np.random.default_rng(0).integers(1, 96, config.train.seq_len + 1)
    inner = dataclasses.replace(config.inner, trajectory="store", remat="mini_batch")

    def loss(params, rate):
        reading = read_sequence(
            graphdef, params["fast"], params["slow"], tokens, inner=inner, learning_rate=rate, bos_id=0
        )
        return reading.loss, reading.token_nll_T

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    results = [program(params, np.float32(rate)) for rate in rates]
    return [nll for (_, nll), _ in results], results[-1][1], params


def test_fast_mlps_change_nothing_at_first_whatever_the_inner_rate(with_fast_mlps, imported):
    """And both they and their scale have a gradient."""
    nlls, gradient, params = readings(with_fast_mlps, (0.0, 1.0))
    _, base = load(imported["qwen3_qk_norm"])
    tokens = np.random.default_rng(0).integers(1, 96, 65)
    expected = base.nll(base.run_prefix(base.embed(tokens[:-1])), tokens[1:])
    for nll_T in nlls:
        np.testing.assert_allclose(nll_T, expected, rtol=0, atol=1e-5)
    assert np.abs(gradient["fast"]["suffix"]["fast_mlp"]["w2"]).max() > 0
    # The control: without the scale, inner steps of rate 1 on a model that was not trained for them are seen.
    params["slow"]["suffix"]["fast_mlp_scale"] = params["slow"]["suffix"]["fast_mlp_scale"] * 0 + 1
    config = load_config(with_fast_mlps)
    graphdef, _ = abstract_model(config.model)
    inner = dataclasses.replace(config.inner, trajectory="store", remat="mini_batch")
    options = {"inner": inner, "learning_rate": 1.0, "bos_id": 0}
    unscaled = read_sequence(graphdef, params["fast"], params["slow"], tokens, **options)
    assert np.abs(unscaled.token_nll_T - expected).max() > 1e-3


def test_fast_mlps_learn_from_the_first_outer_step_on(with_fast_mlps, tmp_path):
    writer = TokenWriter(tmp_path / "store", "train", 96)
    writer.append(np.random.default_rng(0).integers(1, 96, 8 * 64 + 1))
    writer.close()
    write_attributes(tmp_path / "store", {"vocab_size": 96})
    fields = {"train.init_from": with_fast_mlps, "data.path": tmp_path / "store", "train.num_steps": 2}
    fields |= {"train.global_batch_size": 2, "optimizer.warmup_steps": 1, "optimizer.weight_decay": 0, "mesh.data": 1}
    fields |= {"inner.trajectory": "store", "inner.remat": "mini_batch", "optimizer.learning_rate": 1e-3}
    arguments = [f"--config={with_fast_mlps / 'config.json'}", f"--workdir={tmp_path / 'run'}"]
    assert main(["train", *arguments, *(f"--config.{name}={value}" for name, value in fields.items())]) == 0
    config = load_config(tmp_path / "run")  # of two updates, the first has rate 0
    _, abstract = abstract_model(config.model)
    placed = with_shardings(abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    before, after = (load_params(run, placed) for run in (with_fast_mlps, tmp_path / "run"))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert moved["fast"]["suffix"]["fast_mlp"]["w2"] > 5e-4
    assert moved["slow"]["suffix"]["fast_mlp_scale"] > 5e-4


def test_a_window_for_all_blocks():
    theirs = json.loads((DATA / "qwen3_hybrid_layers" / "model" / "config.json").read_text())
    config = huggingface.make_config(theirs, DATA, DATA, [], Additions(8, attention_sinks=3))
    assert config.model.windows == (8,) and config.model.mixers == ("window",) and config.model.attention_sinks == 3


def test_a_model_with_fast_mlps_is_exported_in_two_parts_and_imported_again_to_the_bit(with_fast_mlps, tmp_path):
    """The model's own files are those of the model that fast MLPs were added to."""
    changed, out = tmp_path / "changed", tmp_path / "out"
    arguments = [f"--checkpoint={DATA / 'qwen3_qk_norm' / 'model'}", "--window=16", "--attention_sinks=2"]
    arguments += ["--num_fast_blocks=1", "--fast_intermediate_size=24", "--config.inner.learning_rate=0.25"]
    assert main(["import", "--source=huggingface", *arguments, f"--output={changed}"]) == 0
    assert main(["export", "--target=huggingface", f"--workdir={changed}", f"--output={out}"]) == 0
    theirs = json.loads((out / "config.json").read_text())
    assert theirs["sliding_window"] is None and set(theirs["layer_types"]) == {"full_attention"}
    given = {}
    for file in (DATA / "qwen3_qk_norm" / "model").glob("*.safetensors"):
        given |= safetensors.load_file(file)
    written = safetensors.load_file(out / "model.safetensors")
    assert written.keys() == given.keys() and all(np.array_equal(written[name], given[name]) for name in given)

    assert main(["import", "--source=huggingface", f"--checkpoint={out}", f"--output={tmp_path / 'again'}"]) == 0
    before, after = load_config(changed), load_config(tmp_path / "again")
    assert after.model == before.model and after.inner == before.inner
    _, abstract = abstract_model(before.model)
    placed = with_shardings(abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    jax.tree.map(np.testing.assert_array_equal, *(load_params(run, placed) for run in (changed, tmp_path / "again")))

    # Without what is beside it, it is a model as any other.
    shutil.move(out / "ttt_e2e", tmp_path / "beside")
    assert main(["import", "--source=huggingface", f"--checkpoint={out}", f"--output={tmp_path / 'base'}"]) == 0
    assert load_config(tmp_path / "base").model.num_fast_blocks == 0


@pytest.mark.parametrize(
    ("spoil", "flag", "message"),
    [
        (lambda beside: None, "--num_fast_blocks=1", r"--num_fast_blocks is 1, but .*ttt_e2e/config.json says what"),
        (lambda beside: (beside / "config.json").unlink(), "", r"ttt_e2e/config.json"),
        (lambda beside: (beside / "config.json").write_text("{}"), "", "does not have the fields of an exported model"),
        (lambda beside: (beside / "config.json").write_text("[1]"), "", r"ttt_e2e/config.json"),
        (lambda beside: (beside / "model.safetensors").unlink(), "", "has neither model.safetensors nor"),
        (lambda beside: change_tensors(beside, lambda t: t.popitem()), "", "but in the model it is"),
        (
            lambda beside: change_tensors(beside, lambda t: t.update(more=np.zeros(2))),
            "",
            r"parameter 'more' in .* is \[2\], but in the model it is absent",
        ),
    ],
)
def test_what_is_beside_a_model_and_does_not_fit_is_named(spoil, flag, message, with_fast_mlps, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", "--target=huggingface", f"--workdir={with_fast_mlps}", f"--output={out}"]) == 0
    spoil(out / "ttt_e2e")
    flags = ["--source=huggingface", f"--checkpoint={out}", f"--output={tmp_path / 'again'}", *filter(None, [flag])]
    assert main(["import", *flags]) == 2
    error = capsys.readouterr().err.splitlines()
    assert re.search(message, error[-1]) and sum(line.startswith("error") for line in error) == 1
    assert not (tmp_path / "again").exists()


# ------------------------------------------------------------------------------------------------------------- Engram


def test_engram_is_added_to_a_model_and_changes_nothing_at_first(tmp_path):
    """With `zero_init`; tokens are alike by the tokenizer: here, those of white space if they are bytes."""
    run, case = tmp_path / "run", DATA / "qwen3_qk_norm"
    sizes = {"blocks": "1", "table_size": 50, "num_heads": 2, "head_dim": 4, "zero_init": True}
    overrides = [f"--config.model.engram.{name}={value}" for name, value in sizes.items()]
    huggingface.import_model(case / "model", run, [*overrides, "--config.data.tokenizer=bytes"])
    _, model = load(run)
    [alike] = model.stacks["prefix_1"].engram.alike.get_value()
    assert alike[9:14].tolist() == [9] * 5 and alike[32] == 9 and alike[64:].tolist() == list(range(64, 96))
    with np.load(case / "golden.npz") as golden:
        np.testing.assert_allclose(logits(model, golden["tokens"]), golden["logits"], rtol=0, atol=2e-4)


def test_a_tokenizer_that_is_not_read_leaves_engram_without_alike_tokens(tmp_path):
    """In a line that says so, or by `compress_tokens`."""
    directory, overrides = damaged(tmp_path), ["--config.model.engram.blocks=0", "--config.model.engram.table_size=50"]
    (directory / "tokenizer.json").write_text("{}")
    refused(directory, tmp_path, r"^tokenizer .*tokenizer.json: .*compress_tokens=False\)$", overrides)
    huggingface.import_model(directory, tmp_path / "run", [*overrides, "--config.model.engram.compress_tokens=False"])
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_an_imported_model_keeps_its_tokenizer(tmp_path):
    """The record names it where it is in the end, not where the directory was made."""
    directory = damaged(tmp_path)
    for file in (DATA.parent / "lm_eval" / "tokenizer").iterdir():
        shutil.copyfile(file, directory / file.name)
    run = huggingface.import_model(directory, tmp_path / "run", [])
    record = find_data_record(run)
    assert record.tokenizer_spec == record.asked == load_config(run).data.tokenizer == f"{run}/tokenizer.json"
    assert record.digest == file_digest(record.tokenizer_spec) == file_digest(str(directory / "tokenizer.json"))
