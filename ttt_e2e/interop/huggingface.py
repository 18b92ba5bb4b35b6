"""Imports models of Hugging Face into run directories, and exports them.

An imported model is a run directory: `config.json`, `checkpoints/0`, and its tokenizer. Tensors are read one at a time,
by each device only what it stores of them.
"""

import re
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from ttt_e2e.checkpoints.params import load_params, save_params
from ttt_e2e.checkpoints.progress import progress_of
from ttt_e2e.checkpoints.steps import find_step
from ttt_e2e.cluster.mesh import make_mesh, shardings, with_shardings
from ttt_e2e.config import Config, default_config
from ttt_e2e.errors import UserError
from ttt_e2e.flags import override
from ttt_e2e.interop import additions, huggingface_config, safetensors_files
from ttt_e2e.interop.additions import NOTHING, Additions
from ttt_e2e.interop.rules import Rule, Source, sources_of, tensor_shapes, unknown
from ttt_e2e.model import Transformer, abstract_model
from ttt_e2e.model.engram import with_alike
from ttt_e2e.model.parameters import parameter_name, split
from ttt_e2e.outputs import check_free, new_directory
from ttt_e2e.runs.data_record import write_data_record
from ttt_e2e.runs.directory import write_config
from ttt_e2e.runs.files import read_json
from ttt_e2e.strict_json import to_json
from ttt_e2e.train.batches import find_alike_tokens

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
MAX_SEQ_LEN = 2048  # of the config of an imported model, whose own context may be far longer


_LAYER = "model.layers.{block}."
RULES = (
    Rule("embedding", "model.embed_tokens.weight"),
    Rule("final_norm.weight", "model.norm.weight"),
    Rule("head", "lm_head.weight", transposed=True),
    *(Rule(f"attention.w{x}", f"{_LAYER}self_attn.{x}_proj.weight", transposed=True) for x in "qkvo"),
    *(Rule(f"attention.b{x}", f"{_LAYER}self_attn.{x}_proj.bias") for x in "qkv"),
    *(Rule(f"attention.{x}_norm.weight", f"{_LAYER}self_attn.{x}_norm.weight") for x in "qk"),
    Rule("mlp.w1", f"{_LAYER}mlp.gate_proj.weight", transposed=True),
    Rule("mlp.w3", f"{_LAYER}mlp.up_proj.weight", transposed=True),
    Rule("mlp.w2", f"{_LAYER}mlp.down_proj.weight", transposed=True),
    Rule("attention_norm.weight", f"{_LAYER}input_layernorm.weight"),
    Rule("mlp_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
)
FLOATS = ("F32", "F16", "BF16", "F64")
# Tensors of some files that hold nothing of the model: buffers of RoPE, and a head that is the embedding again.
IGNORED = ("rotary_emb.inv_freq",)


def import_model(checkpoint, output, overrides: list[str], added: Additions = NOTHING) -> Path:
    """Makes the run directory `output` of a model directory as `save_pretrained` writes it.

    Fast MLPs and Engram, which no file of a model has, begin as in a new model, but the last matrix of a fast MLP with
    zeros. A model that was exported with fast MLPs has its own.

    Args:
      checkpoint: the model directory.
      output: the run directory.
      overrides: of its config, as flags `--config.SECTION.FIELD=VALUE`.
      added: window, sinks and fast MLPs.

    Raises:
      UserError: the directory, a file or a tensor is missing, damaged or of another shape, or the model has what ours
        do not; `output` exists and is not empty. Nothing is written then.
    """
    directory, output = Path(checkpoint), Path(output)
    check_free(output)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: it takes a directory as save_pretrained writes it")
    theirs = read_json(directory / "config.json")
    config = make_config(theirs, directory, output, overrides, added)
    tensors = safetensors_files.Tensors(directory)
    _, abstract = abstract_model(config.model)
    sources = sources_of(config.model, RULES)
    _check(tensors, sources, config)
    for name in TOKENIZER_FILES:
        if (directory / name).is_file() and (reason := safetensors_files.not_downloaded(directory / name)):
            raise UserError(f"{directory / name} is {reason}")
    mesh = make_mesh(config.mesh)
    placed = with_shardings(abstract, shardings(abstract, mesh, config.model))
    others = {name: leaf for name, leaf in additions.by_name(placed).items() if name not in sources}
    if additions.are_beside(directory):
        beside = additions.read_params(directory, others)
    else:
        beside = _fresh(config, others, find_alike_tokens(config, _tokenizer_at(directory, config, output)))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _read(tensors, sources, beside, path, leaf), placed)
    with new_directory(output) as new:
        save_params(new / "checkpoints", params, progress_of(0, 0, config))
        _copy_tokenizer(directory, new)
        shutil.copyfile(directory / "config.json", new / "huggingface.json")
        write_data_record(new, config, _tokenizer_at(new, config, output))
        write_config(new, config)
    return output


def make_config(
    theirs: dict, directory: Path, output: Path, overrides: list[str], added: Additions = NOTHING
) -> Config:
    """The config of an imported model."""
    config: ConfigDict = default_config()
    config.model.update(huggingface_config.to_model(theirs))
    seq_len = min(MAX_SEQ_LEN, int(theirs.get("max_position_embeddings") or MAX_SEQ_LEN))
    config.train.seq_len = config.inner.mini_batch_size = seq_len
    if additions.are_beside(directory):
        additions.read_fields(directory, config, added)
    else:
        additions.add(config, added)
    bos_id = theirs.get("bos_token_id")
    bos_id = next(iter(bos_id), None) if isinstance(bos_id, list) else bos_id
    config.data.update(bos_id=int(bos_id or 0), bos_is_zero=bos_id == 0)
    for name in TOKENIZER_FILES[:2]:
        if (directory / name).is_file():
            config.data.tokenizer = str(output.resolve() / name)
            break
    return override(config, overrides)


def export_model(config: Config, checkpoint, output) -> Path:
    """Writes a checkpoint's model into the directory `output`, for transformers, with its tokenizer.

    Fast MLPs and sinks, which transformers has not, go into a directory of their own (additions.py); the rest is a
    model that transformers loads.

    Raises:
      UserError: transformers has no model that computes the same, or there is no such checkpoint.
    """
    output = Path(output)
    check_free(output)
    base = additions.without(config.model)
    theirs = huggingface_config.from_model(base)
    _, abstract = abstract_model(config.model)
    placed = with_shardings(abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = load_params(find_step(checkpoint), placed)
    sources, tensors = sources_of(config.model, RULES), {}
    params = additions.by_name(params)
    for ours, source in sources.items():
        leaf = params[ours]
        for i, (name, _) in enumerate(source.places):

            def make(leaf=leaf, i=i, source=source, name=name):
                value = np.asarray(leaf[i] if source.stacked else leaf)
                return np.ascontiguousarray(_as_theirs(value.T if source.transposed else value, name, config))

            tensors[name] = (source.shape(leaf), leaf.dtype, make)
    with new_directory(output) as new:
        safetensors_files.write(new, dict(sorted(tensors.items())), {"format": "pt"})
        (new / "config.json").write_text(to_json(theirs, indent=2) + "\n")
        if base != config.model:
            additions.write(new, config, {name: leaf for name, leaf in params.items() if name not in sources})
        tokenizer = Path(config.data.tokenizer)
        if tokenizer.name in TOKENIZER_FILES:
            _copy_tokenizer(tokenizer.parent, new)
    return output


def _copy_tokenizer(directory: Path, output: Path) -> None:
    """Copies the files of a tokenizer, those that are there."""
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, output / name)


def _check(tensors: safetensors_files.Tensors, sources: dict[str, Source], config: Config) -> None:
    """Raises `UserError` unless the tensors are those of the model, in name and shape; reads none."""
    for name in unknown(config.model, sources):
        if not re.search(r"\.(fast_mlp\w*|engram)\b", name):
            raise UserError(f"config.model makes a parameter {name!r}, but models of Hugging Face have none")
    directory, shapes = tensors.directory, tensor_shapes(config.model, sources)
    for name, shape in shapes.items():
        if name not in tensors.names:
            raise UserError(f"{directory} has no tensor {name!r}, {list(shape)}, which the model needs")
        if (found := tensors.shape(name)) != shape:
            raise UserError(f"tensor {name!r} in {directory} is {list(found)}, but the model makes it {list(shape)}")
        if tensors.dtype(name) not in FLOATS:
            raise UserError(
                f"tensor {name!r} in {directory} is {tensors.dtype(name)}, but it must be one of {', '.join(FLOATS)}"
            )
    unused = {name for name in tensors.names - shapes.keys() if not name.endswith(IGNORED)}
    if config.model.tie_word_embeddings:
        unused.discard("lm_head.weight")
    if unused:
        raise UserError(f"the model has no place for tensors of {directory}: {', '.join(sorted(unused)[:5])}")


def _tokenizer_at(directory: Path, config: Config, output: Path) -> str:
    """The tokenizer of the config; the model's own one, which goes to `output`, as long as it is in `directory`."""
    tokenizer = Path(config.data.tokenizer)
    return str(directory / tokenizer.name) if tokenizer.parent == output.resolve() else config.data.tokenizer


def _fresh(config: Config, placed: dict, alike_V) -> dict[str, jax.Array]:
    """Initialises the parameters that no file has, those of fast MLPs and Engram: {name: sharded array}."""

    def initialise():
        _, fast, slow = split(Transformer(config.model, nnx.Rngs(config.train.seed)))
        params = {"fast": fast, "slow": slow}
        made = additions.by_name(params if alike_V is None else with_alike(params, alike_V))
        return {name: made[name] * (not name.endswith("fast_mlp.w2")) for name in placed}

    return jax.jit(initialise, out_shardings={name: leaf.sharding for name, leaf in placed.items()})() if placed else {}


def _read(tensors: safetensors_files.Tensors, sources: dict[str, Source], beside: dict[str, jax.Array], path, leaf):
    """Reads a parameter into a sharded array, each device's part, tensor by tensor; or takes it from `beside`."""
    if (name := parameter_name(path)) in beside:
        return beside[name]
    return jax.make_array_from_callback(
        leaf.shape, leaf.sharding, lambda index: sources[name].read(tensors.read, index, leaf.dtype)
    )


def _as_theirs(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Reorders the channels of queries and keys if ours rotate adjacent pairs; theirs are half a head apart."""
    model = config.model
    if model.rope_style == "half" or not any(f".{x}_proj." in name or f".{x}_norm." in name for x in "qk"):
        return tensor
    H = model.head_dim
    heads = tensor.reshape(-1, H, *tensor.shape[1:])
    to_half = np.r_[0:H:2, 1:H:2]
    return heads[:, to_half].reshape(tensor.shape)
