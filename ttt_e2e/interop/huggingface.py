"""Imports models of Hugging Face into run directories, and exports them.

An imported model is a run directory: `config.json`, `checkpoints/0`, and its tokenizer. Tensors are read one at a time,
by each device only what it stores of them.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

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
from ttt_e2e.interop import huggingface_config, safetensors_files
from ttt_e2e.model import Transformer, abstract_model, abstract_transformer
from ttt_e2e.model.engram import with_alike
from ttt_e2e.model.parameters import parameter_name, split
from ttt_e2e.model.stacks import block_indices
from ttt_e2e.runs.data_record import write_data_record
from ttt_e2e.runs.directory import write_config
from ttt_e2e.runs.files import read_json
from ttt_e2e.train.batches import find_alike_tokens

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
MAX_SEQ_LEN = 2048  # of the config of an imported model, whose own context may be far longer
MINI_BATCHES = 16  # of a sequence, in the config of a model with fast MLPs
# Initial scale of the output of fast MLPs. Their last matrix is 0, so that they add nothing before an inner step; with
# this scale what they add after some is too little to see, as inner steps are smaller by it, too.
FAST_LAYER_SCALE = 1e-3


class Rule(NamedTuple):
    """A parameter of ours, and the tensor that holds it."""

    ours: str
    theirs: str  # with {block}, the index of the block
    transposed: bool = False


_LAYER = "model.layers.{block}."
BLOCK_RULES = (
    *(Rule(f"attention.w{x}", f"{_LAYER}self_attn.{x}_proj.weight", transposed=True) for x in "qkvo"),
    *(Rule(f"attention.b{x}", f"{_LAYER}self_attn.{x}_proj.bias") for x in "qkv"),
    *(Rule(f"attention.{x}_norm.weight", f"{_LAYER}self_attn.{x}_norm.weight") for x in "qk"),
    Rule("mlp.w1", f"{_LAYER}mlp.gate_proj.weight", transposed=True),
    Rule("mlp.w3", f"{_LAYER}mlp.up_proj.weight", transposed=True),
    Rule("mlp.w2", f"{_LAYER}mlp.down_proj.weight", transposed=True),
    Rule("attention_norm.weight", f"{_LAYER}input_layernorm.weight"),
    Rule("mlp_norm.weight", f"{_LAYER}post_attention_layernorm.weight"),
)
RULES = (
    Rule("embedding", "model.embed_tokens.weight"),
    Rule("final_norm.weight", "model.norm.weight"),
    Rule("head", "lm_head.weight", transposed=True),
)
# Tensors of some files that hold nothing of the model: buffers of RoPE, and a head that is the embedding again.
IGNORED = ("rotary_emb.inv_freq",)


class Source(NamedTuple):
    """Where a parameter of ours is: the tensors of its blocks, or one tensor."""

    tensors: tuple[str, ...]
    transposed: bool
    stacked: bool


class Additions(NamedTuple):
    """What is added to an imported model for it to learn while it reads."""

    window: int = 0  # of the attention of all blocks; 0 = as it is
    attention_sinks: int = 0  # first positions that windows see, too
    num_fast_blocks: int = 0  # last blocks that get a fast MLP
    fast_intermediate_size: int = 0  # width of the fast MLPs; 0 = that of the others


NOTHING = Additions()


def import_model(checkpoint, output, overrides: list[str], additions: Additions = NOTHING) -> Path:
    """Makes the run directory `output` of a model directory as `save_pretrained` writes it.

    Fast MLPs and Engram, which no file has, begin as in a new model, but the last matrix of a fast MLP with zeros.

    Args:
      checkpoint: the model directory.
      output: the run directory.
      overrides: of its config, as flags `--config.SECTION.FIELD=VALUE`.
      additions: window and fast MLPs.

    Raises:
      UserError: the directory, a file or a tensor is missing, damaged or of another shape, or the model has what ours
        do not; `output` exists and is not empty. Nothing is written then.
    """
    directory, output = Path(checkpoint), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} already exists and is not empty: remove it or choose another")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json: it takes a directory as save_pretrained writes it")
    theirs = read_json(directory / "config.json")
    config = make_config(theirs, directory, output, overrides, additions)
    tensors = safetensors_files.Tensors(directory)
    _, abstract = abstract_model(config.model)
    sources = _sources(config)
    _check(tensors, abstract, sources, config)
    mesh = make_mesh(config.mesh)
    placed = with_shardings(abstract, shardings(abstract, mesh, config.model))
    fresh = _fresh(config, placed, sources, _alike_tokens(config, directory, output))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _read(tensors, sources, fresh, path, leaf), placed)
    save_params(output / "checkpoints", params, progress_of(0, 0, config))
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, output / name)
    shutil.copyfile(directory / "config.json", output / "huggingface.json")
    write_data_record(output, config, config.data.tokenizer)
    write_config(output, config)  # last: without it, this is no run directory
    return output


def make_config(
    theirs: dict, directory: Path, output: Path, overrides: list[str], additions: Additions = NOTHING
) -> Config:
    """The config of an imported model."""
    config: ConfigDict = default_config()
    config.model.update(huggingface_config.to_model(theirs))
    seq_len = min(MAX_SEQ_LEN, int(theirs.get("max_position_embeddings") or MAX_SEQ_LEN))
    config.train.seq_len = config.inner.mini_batch_size = seq_len
    if additions.window:
        config.model.update(sliding_window=additions.window, mixer="")
    config.model.attention_sinks = additions.attention_sinks
    if additions.num_fast_blocks:
        width = additions.fast_intermediate_size or config.model.intermediate_size
        config.model.update(
            num_fast_blocks=additions.num_fast_blocks,
            fast_intermediate_size=width,
            fast_layer_scale=FAST_LAYER_SCALE,
        )
        config.inner.mini_batch_size = max(1, seq_len // MINI_BATCHES)
    bos_id = theirs.get("bos_token_id")
    bos_id = bos_id[0] if isinstance(bos_id, list) else bos_id
    config.data.update(bos_id=bos_id or 0, bos_is_zero=bos_id == 0)
    for name in TOKENIZER_FILES[:2]:
        if (directory / name).is_file():
            config.data.tokenizer = str(output.resolve() / name)
            break
    return override(config, overrides)


def export_model(config: Config, checkpoint, output) -> Path:
    """Writes a checkpoint's model into the directory `output`, for transformers.

    Raises:
      UserError: transformers has no model that computes the same, or there is no such checkpoint.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output {output} already exists and is not empty: remove it or choose another")
    theirs = huggingface_config.from_model(config.model)
    if config.model.num_fast_blocks:
        raise UserError(
            f"config.model.num_fast_blocks is {config.model.num_fast_blocks}, but transformers has no fast MLPs: only "
            "models without them are exported"
        )
    _, abstract = abstract_model(config.model)
    placed = with_shardings(abstract, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    params = load_params(find_step(checkpoint), placed)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        source = _sources(config)[parameter_name(path)]
        for i, name in enumerate(source.tensors):

            def make(leaf=leaf, i=i, source=source, name=name):
                value = np.asarray(leaf[i] if source.stacked else leaf)
                return np.ascontiguousarray(_as_theirs(value.T if source.transposed else value, name, config))

            shape = leaf.shape[1:] if source.stacked else leaf.shape
            tensors[name] = (shape, leaf.dtype, make)
    output.mkdir(parents=True, exist_ok=True)
    safetensors_files.write(output, dict(sorted(tensors.items())), {"format": "pt"})
    (output / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
    return output


def _sources(config: Config) -> dict[str, Source]:
    """{name of a parameter: where it is}; fast MLPs and Engram, which no file has, are not in it."""
    transformer = abstract_transformer(config.model)
    sources = {f"slow.{rule.ours}": Source((rule.theirs,), rule.transposed, False) for rule in RULES}
    prefix = block_indices(transformer.prefix_stacks)
    suffix = block_indices(transformer.suffix_stacks)
    suffix = {name: [config.model.num_prefix_blocks + i for i in indices] for name, indices in suffix.items()}
    for stack, indices in (prefix | suffix).items():
        for rule in BLOCK_RULES:
            tensors = tuple(rule.theirs.format(block=i) for i in indices)
            sources[f"slow.{stack}.{rule.ours}"] = Source(tensors, rule.transposed, True)
    return sources


def _check(tensors: safetensors_files.Tensors, abstract, sources: dict[str, Source], config: Config) -> None:
    """Raises `UserError` unless the tensors are those of the model, in name and shape; reads none."""
    unused = {name for name in tensors.names if not name.endswith(IGNORED)}
    if config.model.tie_word_embeddings:
        unused.discard("lm_head.weight")
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        name = parameter_name(path)
        if name not in sources:
            if not re.search(r"\.(fast_mlp\w*|engram)\b", name):
                raise UserError(f"config.model makes a parameter {name!r}, but models of Hugging Face have none")
            continue
        source = sources[name]
        shape = leaf.shape[1:] if source.stacked else leaf.shape
        shape = shape[::-1] if source.transposed else shape
        for tensor in source.tensors:
            if tensor not in tensors.names:
                raise UserError(f"{tensors.directory} has no tensor {tensor!r}, {list(shape)}, which the model needs")
            if tensors.shape(tensor) != shape:
                raise UserError(
                    f"tensor {tensor!r} in {tensors.directory} is {list(tensors.shape(tensor))}, but the model makes "
                    f"it {list(shape)}"
                )
            if tensors.dtype(tensor) not in ("F32", "F16", "BF16", "F64"):
                raise UserError(f"tensor {tensor!r} in {tensors.directory} is {tensors.dtype(tensor)}, no floats")
            unused.discard(tensor)
    if unused:
        raise UserError(f"the model has no place for tensors of {tensors.directory}: {', '.join(sorted(unused)[:5])}")


def _alike_tokens(config: Config, directory: Path, output: Path) -> np.ndarray | None:
    """Finds the tokens that Engram takes as one; the tokenizer is still in `directory`, and goes to `output`."""
    tokenizer = Path(config.data.tokenizer)
    is_theirs = tokenizer.parent == output.resolve()
    return find_alike_tokens(config, str(directory / tokenizer.name) if is_theirs else config.data.tokenizer)


def _fresh(config: Config, placed, sources: dict[str, Source], alike_V) -> dict[str, jax.Array]:
    """Initialises the parameters that no file has, those of fast MLPs and Engram: {name: sharded array}."""
    leaves = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(placed)}
    shardings_of = {name: leaf.sharding for name, leaf in leaves.items() if name not in sources}

    def initialise():
        _, fast, slow = split(Transformer(config.model, nnx.Rngs(config.train.seed)))
        params = {"fast": fast, "slow": slow}
        made = jax.tree_util.tree_leaves_with_path(params if alike_V is None else with_alike(params, alike_V))
        fresh = {parameter_name(path): leaf for path, leaf in made}
        return {name: fresh[name] * (not name.endswith("fast_mlp.w2")) for name in shardings_of}

    return jax.jit(initialise, out_shardings=shardings_of)() if shardings_of else {}


def _read(tensors: safetensors_files.Tensors, sources: dict[str, Source], fresh: dict[str, jax.Array], path, leaf):
    """Reads a parameter into a sharded array, each device's part, tensor by tensor; or takes it from `fresh`."""
    if parameter_name(path) in fresh:
        return fresh[parameter_name(path)]
    source = sources[parameter_name(path)]

    def part(index):
        of_block = index[1:] if source.stacked else index
        read_index = of_block[::-1] if source.transposed else of_block
        blocks = [
            tensors.read(name, read_index) for name in source.tensors[index[0] if source.stacked else slice(None)]
        ]
        blocks = [np.asarray(block.T if source.transposed else block, leaf.dtype) for block in blocks]
        return np.stack(blocks) if source.stacked else blocks[0]

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _as_theirs(tensor: np.ndarray, name: str, config: Config) -> np.ndarray:
    """Reorders the channels of queries and keys if ours rotate adjacent pairs; theirs are half a head apart."""
    model = config.model
    if model.rope_style == "half" or not any(f".{x}_proj." in name or f".{x}_norm." in name for x in "qk"):
        return tensor
    H = model.head_dim
    heads = tensor.reshape(-1, H, *tensor.shape[1:])
    to_half = np.r_[0:H:2, 1:H:2]
    return heads[:, to_half].reshape(tensor.shape)
