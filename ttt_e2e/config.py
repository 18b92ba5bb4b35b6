"""What a run is made of: frozen dataclasses made from a ConfigDict, validated. The one place that knows what is legal.

A config file is a Python function `get_config(arg)` that starts from `default_config()` and returns a ConfigDict;
`from_config_dict` turns it into a `Config` or raises `UserError` naming the field, the value and what would be legal.
In every field 0 or "" means "off" or "derived", as its comment says; no field is None.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass

from ml_collections import ConfigDict

from ttt_e2e.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64")
MIXERS = ("window", "attention")
TRAJECTORIES = ("auto", "store", "delta", "segment")
ATTENTION_BACKENDS = ("auto", "reference", "xla", "pallas_tpu", "mosaic_gpu", "cudnn", "splash")
REMATS = ("auto", "keep", "mini_batch", "block")
PREFIXES = ("auto", "sequence", "matrices")
# No size or number of steps is larger: JAX counts them in 32 bits, and products of two fit 64.
LARGEST = 2**31 - 1
LARGEST_OF = {"seed": 2**32 - 1, "memory_budget_bytes": 2**63 - 1}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; names as in Hugging Face configurations where one exists."""

    vocab_size: int = 257  # 256 bytes and BOS
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 0  # 0 = num_attention_heads
    head_dim: int = 0  # 0 = hidden_size / num_attention_heads
    sliding_window: int = 0  # k: positions a token attends to, itself included; 0 = full attention
    rope_theta: float = 500_000.0
    rope_style: str = "interleaved"  # pairs of adjacent channels; "half" = Hugging Face weights
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    post_norm: bool = True
    num_fast_blocks: int = 0  # the last blocks, which carry a fast MLP; 0 = no fast weights
    fast_intermediate_size: int = 0  # 0 = intermediate_size
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    # Who computes attention. "auto": on CPUs "xla", on an accelerator what is found right and fastest there.
    # "cudnn" and "splash" serve what is differentiated once, as the prefix is; "auto" takes the rest.
    attention_backend: str = "auto"
    mixer: str = ""  # pattern such as "window,window,attention", repeated over the blocks; "" = by sliding_window

    @property
    def num_prefix_blocks(self) -> int:
        """Number of blocks without a fast MLP."""
        return self.num_hidden_layers - self.num_fast_blocks

    @property
    def mixers(self) -> tuple[str, ...]:
        """Kind of mixer of each block of the pattern, which repeats over the blocks."""
        return tuple(self.mixer.split(",")) if self.mixer else ("window" if self.sliding_window else "attention",)

    @property
    def windows(self) -> tuple[int, ...]:
        """Windows of the pattern's mixers that have one."""
        return tuple(self.sliding_window for name in self.mixers if name == "window")


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop: one SGD step on the fast weights per mini-batch of the text being read."""

    mini_batch_size: int = 128  # b, in tokens
    learning_rate: float = 1.0  # eta
    clip_norm: float = 1.0  # over all fast weights of a sequence; 0 = off
    warmup_steps: int = 0  # outer steps over which eta rises from warmup_init; 0 = off
    warmup_init: float = 0.1
    gradient: str = "exact"  # "first_order": updates are constants to it; "reference": plain autodiff, for tests
    trajectory: str = "auto"  # what rebuilds W_i on the way back: "store", "delta", "segment"; "auto" = what fits
    segment_length: int = 0  # mini-batches, of trajectory "segment"; 0 = a divisor near the square root of all
    remat: str = "auto"  # "keep" what the forward pass computed, or recompute by "mini_batch" or "block"
    memory_budget_bytes: int = 0  # what a step's temporaries may take of a device, for "auto"; 0 = what it has free
    truncate: int = 0  # the meta-gradient flows back through at most this many updates; 0 = all


@dataclass(frozen=True)
class TrainConfig:
    """The outer loop."""

    seq_len: int = 1024  # T
    global_batch_size: int = 8  # B, in sequences, over all devices and accumulation steps
    accumulation_steps: int = 1
    num_steps: int = 100
    seed: int = 0  # of the initial parameters
    init_from: str = ""  # checkpoint directory to take the initial parameters from; "" = fresh


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a warm-up and cosine schedule counted from step 0 (the first update has rate 0)."""

    learning_rate: float = 1e-3  # peak
    end_learning_rate: float = 1e-5
    warmup_steps: int = 10
    decay_steps: int = 0  # in all, warm-up included; 0 = train.num_steps
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # 0 = off
    train_only: str = ""  # regular expression; parameters whose path does not match stay frozen; "" = train all


@dataclass(frozen=True)
class DataConfig:
    """The token store and the order in which it is read."""

    path: str = ""
    train_split: str = "train"
    eval_split: str = "val"
    tokenizer: str = ""  # "bytes" or a .model file; "" = as the token store records
    bos_id: int = 0  # targets equal to it are masked; 0 = off
    shuffle: bool = True
    seed: int = 0
    num_workers: int = 0  # reader processes; 0 = threads only


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh: sequences and parameter shards over `data`, matrices over `model`.

    In the prefix `model` divides the "sequence" or the "matrices"; "auto" takes what moves fewer bytes.
    """

    data: int = 0  # 0 = all devices that `model` leaves
    model: int = 1
    prefix: str = "auto"  # "sequence", "matrices"


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = 100  # 0 = only at the end
    keep: int = 2  # newest
    keep_every: int = 0  # keep for good those at multiples of it; 0 = off


@dataclass(frozen=True)
class LogConfig:
    """Metrics: JSONL always, the others when asked."""

    every_steps: int = 10
    profile_steps: int = 0  # captured after the first ten steps; 0 = off
    slow_step_factor: float = 5.0  # times the median; a step that takes longer is logged, with what held it up; 0 = off
    tensorboard: bool = False
    wandb: str = ""  # project name; "" = off


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text, in the loop and by `ttt-e2e evaluate`."""

    every_steps: int = 0  # 0 = only by `ttt-e2e evaluate`
    num_sequences: int = 0  # the first of the split; 0 = all
    batch_size: int = 8


@dataclass(frozen=True)
class Config:
    """A validated run configuration."""

    model: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()


_SECTIONS = {field.name: type(field.default) for field in dataclasses.fields(Config)}


def default_config() -> ConfigDict:
    """The defaults of every section as a locked ConfigDict, for a config file to fill in."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def to_dict(config: Config) -> dict:
    """Plain nested dict of a config, as stored in a run directory's `config.json`."""
    return dataclasses.asdict(config)


def suggestion(name: str, legal: list[str]) -> str:
    """A hint for a mistyped name: the nearest legal one, else all of them."""
    near = difflib.get_close_matches(str(name), legal, n=1)
    return f"did you mean {near[0]!r}?" if near else f"legal: {', '.join(legal)}"


def from_config_dict(values: ConfigDict | dict) -> Config:
    """Validates a ConfigDict (or the dict of a `config.json`) and fills in what is derived.

    Missing fields take their defaults. Raises `UserError` for unknown fields, values of the wrong type and
    combinations that are not legal.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    if not isinstance(values, dict):
        raise UserError(f"config is {values!r}, but it takes sections: {', '.join(_SECTIONS)}")
    made = {}
    for name, fields in values.items():
        if name not in _SECTIONS:
            raise UserError(f"config has no section {name!r}: {suggestion(name, list(_SECTIONS))}")
        made[name] = _section(_SECTIONS[name], name, fields)
    config = _derive(Config(**made))
    _check_model(config.model)
    _check_run(config)
    return config


def _section(cls, name: str, fields: dict):
    if not isinstance(fields, dict):
        raise UserError(f"config.{name} is {fields!r}, but it is a section with the fields of {cls.__name__}")
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    made = {}
    for field, value in fields.items():
        if field not in defaults:
            raise UserError(f"config.{name} has no field {field!r}: {suggestion(field, list(defaults))}")
        made[field] = _coerce(f"config.{name}.{field}", value, type(defaults[field]))
        if type(made[field]) is int:
            largest = LARGEST_OF.get(field, LARGEST)
            _require(made[field] <= largest, f"config.{name}.{field}", made[field], f"at most {largest}")
    return cls(**made)


def _coerce(name: str, value, kind: type):
    """`value` as `kind` where nothing is lost by it (1 is a legal float, 8.0 a legal int)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    legal = {
        bool: "True or False",
        int: "one integer below 2**63",
        float: "one finite number below 2**63",
        str: "one string",
    }[kind]
    raise UserError(f"{name} is {value!r}, but it takes {legal}")


def _derive(config: Config) -> Config:
    model, optimizer = config.model, config.optimizer
    heads = model.num_attention_heads
    if model.head_dim == 0 and heads > 0:
        _require(
            model.hidden_size % heads == 0,
            "config.model.num_attention_heads",
            heads,
            f"a divisor of hidden_size {model.hidden_size} (or set head_dim)",
        )
    model = dataclasses.replace(
        model,
        num_key_value_heads=model.num_key_value_heads or heads,
        head_dim=model.head_dim or (model.hidden_size // heads if heads > 0 else 0),
        fast_intermediate_size=model.fast_intermediate_size or model.intermediate_size,
    )
    optimizer = dataclasses.replace(optimizer, decay_steps=optimizer.decay_steps or config.train.num_steps)
    return dataclasses.replace(config, model=model, optimizer=optimizer)


def _require(condition: bool, name: str, value, legal: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value!r}, but it must be {legal}")


def _at_least(config, prefix: str, least: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value >= least, f"{prefix}.{field}", value, f"at least {least}")


def _one_of(config, prefix: str, field: str, legal: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in legal:
        raise UserError(f"{prefix}.{field} is {value!r}: {suggestion(value, list(legal))}")


def _check_model(model: ModelConfig) -> None:
    at = "config.model"
    positive = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    _at_least(model, at, 1, *positive.split(), "head_dim", "fast_intermediate_size")
    _at_least(model, at, 0, "sliding_window", "num_fast_blocks", "initializer_range")
    _require(model.rms_norm_eps > 0, f"{at}.rms_norm_eps", model.rms_norm_eps, "above 0")
    _require(model.rope_theta > 0, f"{at}.rope_theta", model.rope_theta, "above 0")
    _require(model.head_dim % 2 == 0, f"{at}.head_dim", model.head_dim, "even (RoPE rotates pairs)")
    _require(
        model.num_attention_heads % model.num_key_value_heads == 0,
        f"{at}.num_key_value_heads",
        model.num_key_value_heads,
        f"a divisor of num_attention_heads {model.num_attention_heads}",
    )
    _require(
        model.num_fast_blocks <= model.num_hidden_layers,
        f"{at}.num_fast_blocks",
        model.num_fast_blocks,
        f"at most num_hidden_layers {model.num_hidden_layers}",
    )
    _one_of(model, at, "rope_style", ("interleaved", "half"))
    _one_of(model, at, "compute_dtype", DTYPES)
    _one_of(model, at, "param_dtype", DTYPES)
    _one_of(model, at, "attention_backend", ATTENTION_BACKENDS)
    _check_mixer(model)


def _check_mixer(model: ModelConfig) -> None:
    if not model.mixer:
        return
    pattern = model.mixer.split(",")
    for name in pattern:
        if name not in MIXERS:
            raise UserError(f"config.model.mixer names {name!r}: {suggestion(name, list(MIXERS))}")
    if "window" in pattern and model.sliding_window == 0:
        raise UserError("config.model.mixer names 'window', but config.model.sliding_window is 0 (full attention)")
    for count in (model.num_prefix_blocks, model.num_fast_blocks):
        _require(
            count % len(pattern) == 0,
            "config.model.mixer",
            model.mixer,
            f"a pattern whose length divides the {model.num_prefix_blocks} prefix and "
            f"{model.num_fast_blocks} suffix blocks",
        )


def _check_run(config: Config) -> None:
    inner, train, optimizer = config.inner, config.train, config.optimizer
    _at_least(inner, "config.inner", 1, "mini_batch_size")
    _at_least(inner, "config.inner", 0, "learning_rate", "clip_norm", "warmup_steps", "warmup_init")
    _one_of(inner, "config.inner", "gradient", ("exact", "first_order", "reference"))
    _one_of(inner, "config.inner", "trajectory", TRAJECTORIES)
    _one_of(inner, "config.inner", "remat", REMATS)
    _at_least(inner, "config.inner", 0, "truncate", "segment_length", "memory_budget_bytes")

    _at_least(train, "config.train", 1, "seq_len", "global_batch_size", "accumulation_steps", "num_steps")
    _at_least(train, "config.train", 0, "seed")
    _require(
        train.seq_len % inner.mini_batch_size == 0,
        "config.train.seq_len",
        train.seq_len,
        f"a multiple of config.inner.mini_batch_size {inner.mini_batch_size}",
    )
    num_mini_batches = train.seq_len // inner.mini_batch_size
    _require(
        inner.segment_length == 0
        or inner.trajectory not in ("auto", "segment")
        or num_mini_batches % inner.segment_length == 0,
        "config.inner.segment_length",
        inner.segment_length,
        f"a divisor of the {num_mini_batches} mini-batches of a sequence",
    )
    _require(
        train.global_batch_size % train.accumulation_steps == 0,
        "config.train.global_batch_size",
        train.global_batch_size,
        f"a multiple of config.train.accumulation_steps {train.accumulation_steps}",
    )
    at = "config.optimizer"
    _at_least(optimizer, at, 0, "learning_rate", "end_learning_rate", "warmup_steps", "weight_decay", "clip_norm")
    _require(
        optimizer.warmup_steps < optimizer.decay_steps,
        f"{at}.warmup_steps",
        optimizer.warmup_steps,
        f"below decay_steps {optimizer.decay_steps}",
    )
    for field in ("b1", "b2"):
        value = getattr(optimizer, field)
        _require(0 <= value < 1, f"{at}.{field}", value, "at least 0 and below 1")
    _at_least(config.data, "config.data", 0, "bos_id", "seed", "num_workers")
    _require(
        config.data.bos_id < config.model.vocab_size,
        "config.data.bos_id",
        config.data.bos_id,
        f"below config.model.vocab_size {config.model.vocab_size}",
    )
    _at_least(config.mesh, "config.mesh", 0, "data")
    _at_least(config.mesh, "config.mesh", 1, "model")
    _one_of(config.mesh, "config.mesh", "prefix", PREFIXES)
    _require(
        config.mesh.prefix != "sequence" or config.train.seq_len % config.mesh.model == 0,
        "config.mesh.prefix",
        config.mesh.prefix,
        f"'matrices' or 'auto', as config.mesh.model {config.mesh.model} does not divide train.seq_len {train.seq_len}",
    )
    _at_least(config.checkpoint, "config.checkpoint", 0, "every_steps", "keep_every")
    _at_least(config.checkpoint, "config.checkpoint", 1, "keep")
    _at_least(config.log, "config.log", 1, "every_steps")
    _at_least(config.log, "config.log", 0, "profile_steps", "slow_step_factor")
    _at_least(config.eval, "config.eval", 0, "every_steps", "num_sequences")
    _at_least(config.eval, "config.eval", 1, "batch_size")
