"""Converts a ConfigDict, or the dict of a `config.json`, to a validated `Config`, and back."""

import dataclasses
import importlib
from collections.abc import Iterable

from ml_collections import ConfigDict, FieldReference

from ttt_e2e.config.fields import LARGEST, check, coerce, each_field, expand_home, require, suggestion
from ttt_e2e.config.sections import MIXER_FILES, MIXER_SECTIONS, MIXERS, Config, ModelConfig
from ttt_e2e.errors import UserError, first_line

LARGEST_FLOAT_ID = 2**24  # ids are kept in float32 there, which has all integers up to this one

_SECTIONS = {part.name: type(part.default) for part in dataclasses.fields(Config)}


def default_config() -> ConfigDict:
    """The defaults of every section as a locked ConfigDict, for a config file to fill in."""
    _import_mixers(MIXER_FILES)
    values = dataclasses.asdict(Config())
    del values["model"]["mixer_sections"]
    values["model"] |= {mixer: dataclasses.asdict(section()) for mixer, section in MIXER_SECTIONS.items()}
    # Without types: NumPy's integers and paths are legal values, and validation names the field of others.
    return ConfigDict(values, type_safe=False).lock()


def to_dict(config: Config) -> dict:
    """The nested dict of a config that is stored as a run directory's `config.json`.

    It has the fields of those mixers only that the model uses, and those of Engram if it has one.
    """
    values = dataclasses.asdict(config)
    if not config.model.engram.blocks:
        del values["model"]["engram"]
    sections = dict(values["model"].pop("mixer_sections"))
    values["model"] |= {mixer: sections[mixer] for mixer in config.model.mixers if mixer in sections}
    return values


def from_config_dict(values: ConfigDict | dict) -> Config:
    """Validates a ConfigDict, or the dict of a `config.json`, and fills in defaults and derived values.

    Raises:
      UserError: an unknown field, a value of the wrong type or out of range, or an illegal combination: one line with
        the field, the value and what is legal.
    """
    values = as_dict(values) if isinstance(values, ConfigDict) else values
    if not isinstance(values, dict):
        raise UserError(f"config is {values!r}, but it takes sections: {', '.join(_SECTIONS)}")
    model = values.get("model")
    _import_mixers(str(model.get("mixer", "")).split(",") if isinstance(model, dict) else [])
    sections = {}
    for name, fields in ({"model": {}} | values).items():
        if name not in _SECTIONS:
            raise UserError(f"config has no section {name!r}: {suggestion(name, _SECTIONS)}")
        sections[name] = _section(_SECTIONS[name], name, fields)
    config = _derive(Config(**sections))
    for section, f, value in each_field(config):
        check(f"config.{section}.{f.name}", value, f)
    _check_model(config.model)
    _check_run(config)
    return config


def as_dict(values: ConfigDict, at: str = "config") -> dict:
    """The nested dict of a ConfigDict. Raises `UserError` where a reference has no value, as a required placeholder."""
    fields = {}
    for name, value in values.items(preserve_field_references=True):
        try:
            value = value.get() if isinstance(value, FieldReference) else value
        except Exception as error:  # a reference computes its value here, by the user's own functions
            raise UserError(
                f"{at}.{name} has no value yet ({first_line(error)}): set it by --{at}.{name}=VALUE"
            ) from None
        fields[name] = as_dict(value, f"{at}.{name}") if isinstance(value, ConfigDict) else value
    return fields


def _import_mixers(names: Iterable[str]) -> None:
    """Imports the package's mixers of these names, which declare their sections in their files.

    By name, so that `config` imports nothing that stands above it; only here does it wait for JAX.
    """
    for name in names:
        if name in MIXER_FILES:
            importlib.import_module(f"ttt_e2e.model.mixers.{name}")


def _section(cls, name: str, fields: dict):
    """One section, an instance of `cls`, of checked names and types. Raises `UserError` for others."""
    if not isinstance(fields, dict):
        raise UserError(f"config.{name} is {fields!r}, but it is a section with the fields of {cls.__name__}")
    known = {f.name: f for f in dataclasses.fields(cls) if f.name != "mixer_sections"}
    nested = MIXER_SECTIONS if cls is ModelConfig else {}
    values = {}
    for field, value in fields.items():
        if field in nested:
            continue
        if field not in known:
            raise UserError(f"config.{name} has no field {field!r}: {suggestion(field, known)}")
        at, kind = f"{name}.{field}", type(known[field].default)
        is_section = dataclasses.is_dataclass(kind)
        value = _section(kind, at, value) if is_section else coerce(f"config.{at}", value, kind)
        values[field] = expand_home(value) if known[field].metadata.get("is_path") else value
    if nested:
        sections = ((mixer, _section(of, f"{name}.{mixer}", fields.get(mixer, {}))) for mixer, of in nested.items())
        values["mixer_sections"] = tuple(sections)
    return cls(**values)


def _derive(config: Config) -> Config:
    """Replaces the 0 of fields such as `head_dim` by the value that it stands for."""
    model, optimizer = config.model, config.optimizer
    heads = model.num_attention_heads
    if model.head_dim == 0 and heads > 0:
        require(
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


# ------------------------------------------------------------------------------------ checks that relate several fields
def _check_model(model: ModelConfig) -> None:
    at = "config.model"
    require(model.head_dim % 2 == 0, f"{at}.head_dim", model.head_dim, "even (RoPE rotates pairs)")
    require(
        model.num_attention_heads % model.num_key_value_heads == 0,
        f"{at}.num_key_value_heads",
        model.num_key_value_heads,
        f"a divisor of num_attention_heads {model.num_attention_heads}",
    )
    require(
        model.rope_low_freq_factor < model.rope_high_freq_factor,
        f"{at}.rope_high_freq_factor",
        model.rope_high_freq_factor,
        f"above rope_low_freq_factor {model.rope_low_freq_factor}",
    )
    require(
        model.num_fast_blocks <= model.num_hidden_layers,
        f"{at}.num_fast_blocks",
        model.num_fast_blocks,
        f"at most num_hidden_layers {model.num_hidden_layers}",
    )
    if model.mixer:
        _check_mixer(model)
    if model.attention_sinks and "window" not in model.mixers:
        raise UserError(
            f"config.model.attention_sinks is {model.attention_sinks}, but it must be 0 where no block has window "
            "attention (config.model.sliding_window, config.model.mixer)"
        )
    if model.engram.blocks:
        _check_engram(model)


def _check_mixer(model: ModelConfig) -> None:
    pattern = model.mixer.split(",")
    for name in pattern:
        if name not in MIXERS:
            raise UserError(f"config.model.mixer names {name!r}: {suggestion(name, MIXERS)}")
    if "window" in pattern and model.sliding_window == 0:
        raise UserError("config.model.mixer names 'window', but config.model.sliding_window is 0 (full attention)")
    require(
        model.num_hidden_layers % len(pattern) == 0,
        "config.model.mixer",
        model.mixer,
        f"a pattern whose length divides the {model.num_hidden_layers} blocks of num_hidden_layers",
    )


def _check_engram(model: ModelConfig) -> None:
    at, blocks, prefix = "config.model.engram", model.engram.blocks, model.num_prefix_blocks
    legal = f"different indices of blocks without a fast MLP, 0 to {prefix - 1}, separated by commas"
    names = blocks.split(",")
    require(prefix > 0, f"{at}.blocks", blocks, "empty, as all blocks have a fast MLP")
    are_indices = all(name.isascii() and name.isdigit() and len(name) < 10 and int(name) < prefix for name in names)
    require(are_indices and len(set(map(int, names))) == len(names), f"{at}.blocks", blocks, legal)
    if model.engram.compress_tokens:
        legal = f"at most {LARGEST_FLOAT_ID} where config.model.engram.compress_tokens is True"
        require(model.vocab_size <= LARGEST_FLOAT_ID, "config.model.vocab_size", model.vocab_size, legal)
    num_tables = 2 * model.engram.num_heads
    most = LARGEST // num_tables
    legal = f"at most {most}, as all {num_tables} tables of a block together must have fewer than 2**31 rows"
    require(model.engram.table_size <= most, f"{at}.table_size", model.engram.table_size, legal)


def _check_run(config: Config) -> None:
    inner, train, optimizer, mesh = config.inner, config.train, config.optimizer, config.mesh
    require(
        train.seq_len % inner.mini_batch_size == 0,
        "config.train.seq_len",
        train.seq_len,
        f"a multiple of config.inner.mini_batch_size {inner.mini_batch_size}",
    )
    num_mini_batches = train.seq_len // inner.mini_batch_size
    require(
        inner.segment_length == 0
        or inner.trajectory not in ("auto", "segment")
        or num_mini_batches % inner.segment_length == 0,
        "config.inner.segment_length",
        inner.segment_length,
        f"a divisor of the {num_mini_batches} mini-batches of a sequence",
    )
    require(
        train.global_batch_size % train.accumulation_steps == 0,
        "config.train.global_batch_size",
        train.global_batch_size,
        f"a multiple of config.train.accumulation_steps {train.accumulation_steps}",
    )
    require(
        optimizer.warmup_steps < optimizer.decay_steps,
        "config.optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"below decay_steps {optimizer.decay_steps}",
    )
    require(
        config.data.bos_id < config.model.vocab_size,
        "config.data.bos_id",
        config.data.bos_id,
        f"below config.model.vocab_size {config.model.vocab_size}",
    )
    require(
        not (config.data.bos_is_zero and config.data.bos_id),
        "config.data.bos_id",
        config.data.bos_id,
        "0 where config.data.bos_is_zero is True",
    )
    require(
        mesh.prefix != "sequence" or train.seq_len % mesh.model == 0,
        "config.mesh.prefix",
        mesh.prefix,
        f"'matrices' or 'auto', as config.mesh.model {mesh.model} does not divide train.seq_len {train.seq_len}",
    )
