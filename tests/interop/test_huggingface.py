"""Models of Hugging Face in and out: the numbers that transformers gives, and the files to the bit.

tests/data/huggingface has tiny models with random weights, norms and biases away from 1 and 0, and the logits that
transformers computed with them (float32).
"""

import base64
import dataclasses
import json
import re
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from ttt_e2e.checkpoints.params import load_params
from ttt_e2e.cli import main
from ttt_e2e.cluster.mesh import with_shardings
from ttt_e2e.config import EngramConfig, ModelConfig
from ttt_e2e.data.store import TokenWriter, write_attributes
from ttt_e2e.data.tokenizers import file_digest
from ttt_e2e.errors import UserError
from ttt_e2e.inference.prompts import find_tokenizer
from ttt_e2e.inner import read_sequence
from ttt_e2e.interop import huggingface, huggingface_config
from ttt_e2e.interop.additions import Additions
from ttt_e2e.model import abstract_model
from ttt_e2e.model.parameters import merge
from ttt_e2e.runs.data_record import find_data_record
from ttt_e2e.runs.directory import load_config

safetensors = pytest.importorskip("safetensors.numpy")

DATA = Path(__file__).parents[1] / "data" / "huggingface"
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


# -------------------------------------------------------------------------------------------------------------- traps


def damaged(tmp_path, case="llama3_scaled_rope") -> Path:
    shutil.copytree(DATA / case / "model", tmp_path / "model")
    return tmp_path / "model"


def change_tensors(directory, change) -> None:
    tensors = safetensors.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, directory / "model.safetensors")


def change_config(directory, **fields) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


DOWN, Q = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"
TENSORS = {
    "transposed": (
        lambda t: t.update({DOWN: np.ascontiguousarray(t[DOWN].T)}),
        r"down_proj.weight' in .* is \[80, 48\], but the model makes it \[48, 80\]",
    ),
    "missing": (lambda t: t.pop(DOWN), r"has no tensor 'model.layers.1.mlp.down_proj.weight', \[48, 80\]"),
    "extra": (lambda t: t.update(extra=np.zeros(3, np.float32)), "has no place for tensors of .*: extra"),
    "integers": (
        lambda t: t.update({DOWN: t[DOWN].astype(np.int32)}),
        "down_proj.weight' in .* is I32, but it must be one of F32, F16, BF16, F64",
    ),
    "bytes": (lambda t: t.update({Q: t[Q].astype(np.uint8)}), "q_proj.weight' in .* is U8, but it must be one of F32"),
    "a vector": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]}),
        r"model.norm.weight' in .* is \[1, 48\], but the model makes it \[48\]",
    ),
    "a norm after the MLP": (
        lambda t: t.update({"model.layers.0.post_feedforward_layernorm.weight": t["model.norm.weight"]}),
        "has no place for tensors of .*: model.layers.0.post_feedforward_layernorm.weight",
    ),
    "a block more": (lambda t: t.update({DOWN.replace(".1.", ".3."): t[DOWN]}), "has no place for tensors of .*.3.mlp"),
    "another width": (
        lambda t: t.update({Q: t[Q][:24]}),
        r"q_proj.weight' in .* is \[24, 48\], but the model makes it \[48, 48\]",
    ),
}


@pytest.mark.parametrize("trap", TENSORS)
def test_tensors_that_do_not_fit_are_named(trap, tmp_path):
    change, message = TENSORS[trap]
    directory = damaged(tmp_path)
    change_tensors(directory, change)
    refused(directory, tmp_path, message)


def refused(directory, tmp_path, message, overrides=()) -> None:
    with pytest.raises(UserError, match=message) as error:
        huggingface.import_model(directory, tmp_path / "run", list(overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


CONFIGS = [
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but it must be 'silu'"),
    ({"model_type": "gemma2"}, "model_type is 'gemma2', but it must be one of llama, mistral, qwen2, qwen3"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn', but it must be"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling has no 'low_freq_factor'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": None}}, "rope_scaling has no 'factor'"),
    ({"attention_bias": True}, "attention_bias is True, but only qwen2"),
    ({"mlp_bias": True}, "mlp_bias is True, but it must be False"),
    ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types has 'linear_attention'"),
    ({"layer_types": ["full_attention"]}, "layer_types has 1 layers, but num_hidden_layers is 3"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention', but it must be a list"),
    ({"hidden_size": None}, "has no 'hidden_size'"),
    ({"rms_norm_eps": None}, "has no 'rms_norm_eps'"),
    ({"rms_norm_eps": "small"}, "config.json: rms_norm_eps is 'small', but it takes one finite number"),
    ({"hidden_size": "48"}, "config.json: hidden_size is '48', but it takes one integer"),
    ({"hidden_size": 48.5}, "config.json: hidden_size is 48.5, but it takes one integer"),
    ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0, but it must be at least 1"),
    ({"num_key_value_heads": -1}, "config.json: num_key_value_heads is -1, but it must be at least 0"),
    ({"bos_token_id": ["<s>"]}, "config.json: bos_token_id is '<s>', but it takes one integer"),
    ({"rope_scaling": [8.0]}, "rope_scaling is .8.0., but it must be one object of numbers"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters is .*, but it must be one object"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta is '1e6', but it takes one finite number"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5, but it must"),
    ({"partial_rotary_factor": 0.5}, "config.json: partial_rotary_factor is 0.5, but it must be 1.0"),
    ({"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config, but weights must be floats: dequ"),
]


@pytest.mark.parametrize(("fields", "message"), CONFIGS)
def test_what_the_model_does_not_have_is_named(fields, message, tmp_path):
    directory = damaged(tmp_path)
    change_config(directory, **fields)
    refused(directory, tmp_path, message)


WRONG_VALUES = ("x", [], [1], ["x"], {}, {"rope_type": 3}, {"factor": "x"}, -1, 0, 1.5, True, 10**30, float("nan"))


@pytest.mark.parametrize("case", ("llama3_scaled_rope", "qwen3_hybrid_layers"))
def test_a_field_of_any_value_is_legal_or_named(case):
    """What is legal has the type that our own field has."""
    theirs = json.loads((DATA / case / "model" / "config.json").read_text())
    more = ("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "max_window_layers", "head_dim")
    refusals = 0
    for name in (*theirs, *more):
        for value in WRONG_VALUES:
            try:
                model = huggingface_config.to_model(theirs | {name: value})
            except UserError as error:
                assert "\n" not in str(error) and "config.json" in str(error)
                refusals += 1
            else:
                for field, ours in model.items():
                    assert type(ours) is type(getattr(ModelConfig(), field)), (name, value, field)
    assert refusals > 100


def header_of_another_length(path):
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**40) + content[8:])


def overlapping_ranges(path):
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    first, second, *_ = (name for name in header if name != "__metadata__")
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def header_a_little_longer(path):
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + 1) + content[8:])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


DAMAGES = [header_of_another_length, header_a_little_longer, overlapping_ranges, cut_short, cut_in_the_header, empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage, tmp_path):
    directory = damaged(tmp_path)
    damage(directory / "model.safetensors")
    refused(directory, tmp_path, r"model.safetensors is no whole safetensors file: ")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [(["post_norm=true"], "attention_post_norm.weight"), (["mixer=mamba2", "mamba2.head_dim=48"], "mamba2.*")],
)
def test_parameters_that_no_such_model_has_are_named(overrides, name, tmp_path):
    message = f"config.model makes a parameter 'slow.prefix.{name}', but models of Hugging Face have none"
    refused(damaged(tmp_path), tmp_path, message, [f"--config.model.{override}" for override in overrides])


def test_half_a_download_is_named(tmp_path):
    directory = damaged(tmp_path, "llama2_tied_mha")
    (directory / "model-00002-of-00005.safetensors").unlink()
    refused(directory, tmp_path, "index.json names model-00002-of-00005.safetensors, which is missing: the download")
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, tmp_path, "has neither model.safetensors nor model.safetensors.index.json")
    (directory / "pytorch_model.bin").touch()
    refused(directory, tmp_path, "pytorch_model.bin is not read, as it is no safetensors file")
    (directory / "config.json").unlink()
    refused(directory, tmp_path, "has no config.json")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4976698672\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Access to this model is restricted</title></head></html>\n"


@pytest.mark.parametrize(("content", "message"), [(POINTER, "a pointer of Git LFS"), (PAGE, "a web page in place of")])
def test_what_stands_in_place_of_a_file_is_named(content, message, tmp_path):
    """In a clone without Git LFS, or of a model whose user was not granted access."""
    directory = damaged(tmp_path, "llama2_tied_mha")
    (directory / "tokenizer.json").write_text(content)
    refused(directory, tmp_path, f"^{directory / 'tokenizer.json'} is {message}")
    shard = directory / "model-00002-of-00005.safetensors"
    shard.write_text(content)
    refused(directory, tmp_path, f"^{shard} is no whole safetensors file: {message}")
    (directory / "model.safetensors.index.json").write_text(content)
    refused(directory, tmp_path, "model.safetensors.index.json is not readable JSON")
    (directory / "config.json").write_text(content)
    refused(directory, tmp_path, "config.json is not readable JSON")


def test_a_download_that_is_not_finished_is_named(tmp_path):
    """Its part, as huggingface_hub leaves it, and links of its cache to what is not there."""
    directory = damaged(tmp_path)
    (directory / "model.safetensors").unlink()
    part = directory / ".cache" / "huggingface" / "download" / "model.safetensors.0123.incomplete"
    part.parent.mkdir(parents=True)
    part.touch()
    message = (
        "has neither model.safetensors nor model.safetensors.index.json; model.safetensors.0123.incomplete says that"
    )
    refused(directory, tmp_path, message)
    (directory / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    refused(directory, tmp_path, message)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "index.json has no weight_map"),
        ([], "index.json has no weight_map"),
        ({"lm_head.weight": 3}, "index.json: its weight_map names 3, but it takes names of files"),
        ({"lm_head.weight": None}, "index.json: its weight_map names None, but"),
        ({"lm_head.bias": "model.safetensors"}, "model.safetensors has no tensor 'lm_head.bias', which model.safe"),
        ({"lm_head.weight": "absent.safetensors"}, "index.json names absent.safetensors, which is missing: the down"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_named(weight_map, message, tmp_path):
    directory = damaged(tmp_path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(directory, tmp_path, message)


def test_a_table_of_tiktoken_is_no_tokenizer_of_the_run(tmp_path):
    """Llama 3 has one beside its tokenizer.json; alone, what asks for the tokenizer says where to get another."""
    directory = damaged(tmp_path)
    (directory / "tokenizer.model").write_text(
        "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    )
    huggingface.import_model(directory, tmp_path / "run", [])
    with pytest.raises(
        UserError, match=r"Llama 3's table of tiktoken.*legal: the tokenizer.json of the same model"
    ) as error:
        find_tokenizer(load_config(tmp_path / "run"))
    assert "\n" not in str(error.value)
    (directory / "tokenizer.json").write_text("{}")
    config = huggingface.make_config(json.loads((directory / "config.json").read_text()), directory, directory, [])
    assert Path(config.data.tokenizer).name == "tokenizer.json"


def test_an_output_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(UserError, match="already exists and is not empty"):
        huggingface.import_model(DATA / "qwen2_bias" / "model", tmp_path / "run", [])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"post_norm": True}, "config.model.post_norm is True, which transformers has in none"),
        ({"mixer": "mamba2"}, "config.model.mixer names 'mamba2', which transformers has in none"),
        ({"engram": EngramConfig(blocks="1")}, "config.model.engram.blocks is '1', but transformers has no Engram"),
        ({"attention_bias": True, "qk_norm": True}, "has qk_norm and attention_bias"),
    ],
)
def test_models_that_cannot_be_expressed_are_not_exported(fields, message, tmp_path):
    config = load_config_of_case("qwen3_qk_norm", tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
    with pytest.raises(UserError, match=message):
        huggingface.export_model(config, tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def load_config_of_case(case, tmp_path):
    theirs = json.loads((DATA / case / "model" / "config.json").read_text())
    return huggingface.make_config(theirs, DATA / case / "model", tmp_path, [])


@pytest.mark.parametrize("bos, expected", ((0, (0, True)), (1, (1, False)), ([0, 1], (0, True)), (None, (0, False))))
def test_the_bos_token_0_is_masked_too(bos, expected, tmp_path):
    directory = DATA / "llama2_tied_mha" / "model"
    theirs = json.loads((directory / "config.json").read_text()) | {"bos_token_id": bos}
    data = huggingface.make_config(theirs, directory, tmp_path, []).data
    assert (data.bos_id, data.bos_is_zero) == expected
