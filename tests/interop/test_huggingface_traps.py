"""Models of Hugging Face that are damaged, incomplete or of another kind: refused in one line, with nothing written."""

import base64
import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.interop.directories import DATA, change_tensors, damaged, refused
from ttt_e2e.config import EngramConfig, ModelConfig
from ttt_e2e.errors import UserError
from ttt_e2e.inference.prompts import find_tokenizer
from ttt_e2e.interop import huggingface, huggingface_config
from ttt_e2e.runs.directory import load_config


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
