"""What a run may be made of, and the line that answers what it may not."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ttt_e2e.config import Config, default_config, from_config_dict, suggestion, to_dict
from ttt_e2e.errors import UserError


def error_of(values) -> str:
    """The message that refuses `values`, which is one line."""
    with pytest.raises(UserError) as error:
        from_config_dict(values)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_default_is_valid_and_its_derived_fields_are_filled_in():
    config = from_config_dict(default_config())
    assert config.model.num_key_value_heads == config.model.num_attention_heads == 4
    assert config.model.head_dim == 128 // 4
    assert config.model.fast_intermediate_size == config.model.intermediate_size == 352
    assert config.optimizer.decay_steps == config.train.num_steps == 100


def test_missing_sections_and_fields_take_their_defaults():
    assert from_config_dict({}) == from_config_dict(default_config())
    assert from_config_dict({"model": {"hidden_size": 256}}).model.num_hidden_layers == 4


def test_no_default_is_none():
    """A flag cannot override None: it has no type."""
    for section in to_dict(Config()).values():
        assert None not in section.values()


def test_default_is_locked_and_its_fields_keep_their_types():
    config = default_config()
    with pytest.raises(AttributeError):
        config.model.hidden_sise = 8
    config.model.hidden_size = "eight"  # NumPy's integers and paths may be there: validation tells
    with pytest.raises(UserError, match=r"config\.model\.hidden_size is 'eight', but it takes one integer"):
        from_config_dict(config)


# Each line: a section, what is put in it, and what the message must name.
BAD = [
    # mistyped names
    ("model", {"hiden_size": 8}, "'hiden_size'", "did you mean 'hidden_size'?"),
    ("inner", {"mini_batch": 8}, "'mini_batch'", "did you mean 'mini_batch_size'?"),
    ("model", {"zzz": 8}, "'zzz'", "legal: vocab_size, hidden_size"),
    ("modle", {}, "'modle'", "did you mean 'model'?"),
    ("model", 8, "config.model is 8", "section"),
    # mistyped values
    ("model", {"rope_style": "halve"}, "config.model.rope_style is 'halve'", "did you mean 'half'?"),
    ("model", {"compute_dtype": "bf16"}, "config.model.compute_dtype is 'bf16'", "bfloat16"),
    ("model", {"param_dtype": "int8"}, "config.model.param_dtype is 'int8'", "float32"),
    ("model", {"mixer": "attention,windows"}, "config.model.mixer", "'windows'", "did you mean 'window'?"),
    ("inner", {"gradient": "exat"}, "config.inner.gradient is 'exat'", "exact"),
    # a value of another type
    ("model", {"hidden_size": [8, 16]}, "config.model.hidden_size is [8, 16]", "one integer"),
    ("model", {"hidden_size": "8"}, "config.model.hidden_size is '8'", "one integer"),
    ("model", {"hidden_size": 8.5}, "config.model.hidden_size is 8.5", "one integer"),
    ("model", {"hidden_size": True}, "config.model.hidden_size is True", "one integer"),
    ("model", {"hidden_size": None}, "config.model.hidden_size is None", "one integer"),
    ("model", {"hidden_size": math.inf}, "config.model.hidden_size is inf", "one integer"),
    ("model", {"hidden_size": math.nan}, "config.model.hidden_size is nan", "one integer"),
    ("inner", {"learning_rate": math.nan}, "config.inner.learning_rate is nan", "one finite number"),
    ("inner", {"learning_rate": -math.inf}, "config.inner.learning_rate is -inf", "one finite number"),
    ("inner", {"learning_rate": "fast"}, "config.inner.learning_rate is 'fast'", "one finite number"),
    ("inner", {"learning_rate": (1.0, 2.0)}, "config.inner.learning_rate is (1.0, 2.0)", "one finite number"),
    ("inner", {"learning_rate": False}, "config.inner.learning_rate is False", "one finite number"),
    ("data", {"path": ["a", "b"]}, "config.data.path is ['a', 'b']", "one string"),
    ("data", {"shuffle": 1}, "config.data.shuffle is 1", "True or False"),
    ("data", {"shuffle": "yes"}, "config.data.shuffle is 'yes'", "True or False"),
    # the network
    ("model", {"vocab_size": 0}, "config.model.vocab_size is 0", "at least 1"),
    ("model", {"hidden_size": 0}, "config.model.hidden_size is 0", "at least 1"),
    ("model", {"hidden_size": -8}, "config.model.hidden_size is -8", "at least 1"),
    ("model", {"intermediate_size": 0}, "config.model.intermediate_size is 0", "at least 1"),
    ("model", {"num_hidden_layers": 0}, "config.model.num_hidden_layers is 0", "at least 1"),
    ("model", {"num_attention_heads": 0}, "config.model.num_attention_heads is 0", "at least 1"),
    ("model", {"num_attention_heads": -4}, "config.model.num_attention_heads is -4", "at least 1"),
    ("model", {"num_attention_heads": 3}, "config.model.num_attention_heads is 3", "divisor of hidden_size 128"),
    ("model", {"num_key_value_heads": 3}, "config.model.num_key_value_heads is 3", "divisor", "4"),
    ("model", {"num_key_value_heads": -1}, "config.model.num_key_value_heads is -1", "at least 1"),
    ("model", {"head_dim": 5}, "config.model.head_dim is 5", "even"),
    ("model", {"head_dim": -2}, "config.model.head_dim is -2", "at least 1"),
    ("model", {"sliding_window": -1}, "config.model.sliding_window is -1", "at least 0"),
    ("model", {"rope_theta": 0}, "config.model.rope_theta is 0", "above 0"),
    ("model", {"rms_norm_eps": 0}, "config.model.rms_norm_eps is 0", "above 0"),
    ("model", {"initializer_range": -0.1}, "config.model.initializer_range is -0.1", "at least 0"),
    ("model", {"num_fast_blocks": 5}, "config.model.num_fast_blocks is 5", "at most num_hidden_layers 4"),
    ("model", {"num_fast_blocks": -1}, "config.model.num_fast_blocks is -1", "at least 0"),
    ("model", {"fast_intermediate_size": -1}, "config.model.fast_intermediate_size is -1", "at least 1"),
    ("model", {"mixer": "window"}, "config.model.mixer", "config.model.sliding_window is 0"),
    ("model", {"mixer": "attention,attention,attention"}, "config.model.mixer", "divides the 4 blocks"),
    # the inner loop
    ("inner", {"mini_batch_size": 0}, "config.inner.mini_batch_size is 0", "at least 1"),
    ("inner", {"mini_batch_size": -128}, "config.inner.mini_batch_size is -128", "at least 1"),
    ("inner", {"learning_rate": -1}, "config.inner.learning_rate is -1", "at least 0"),
    ("inner", {"clip_norm": -1}, "config.inner.clip_norm is -1", "at least 0"),
    ("inner", {"warmup_steps": -1}, "config.inner.warmup_steps is -1", "at least 0"),
    ("inner", {"warmup_init": -1}, "config.inner.warmup_init is -1", "at least 0"),
    # the outer loop
    ("train", {"seq_len": 1000}, "config.train.seq_len is 1000", "multiple of config.inner.mini_batch_size 128"),
    ("train", {"seq_len": 0}, "config.train.seq_len is 0", "at least 1"),
    ("train", {"global_batch_size": 0}, "config.train.global_batch_size is 0", "at least 1"),
    ("train", {"accumulation_steps": 3}, "config.train.global_batch_size is 8", "accumulation_steps 3"),
    ("train", {"accumulation_steps": 0}, "config.train.accumulation_steps is 0", "at least 1"),
    ("train", {"num_steps": 0}, "config.train.num_steps is 0", "at least 1"),
    ("train", {"seed": -1}, "config.train.seed is -1", "at least 0"),
    ("optimizer", {"learning_rate": -1}, "config.optimizer.learning_rate is -1", "at least 0"),
    ("optimizer", {"warmup_steps": 100}, "config.optimizer.warmup_steps is 100", "below decay_steps 100"),
    ("optimizer", {"warmup_steps": -1}, "config.optimizer.warmup_steps is -1", "at least 0"),
    ("optimizer", {"b1": 1}, "config.optimizer.b1 is 1", "below 1"),
    ("optimizer", {"b2": -0.1}, "config.optimizer.b2 is -0.1", "at least 0"),
    ("optimizer", {"weight_decay": -1}, "config.optimizer.weight_decay is -1", "at least 0"),
    ("optimizer", {"clip_norm": -1}, "config.optimizer.clip_norm is -1", "at least 0"),
    # the rest
    ("data", {"bos_id": 257}, "config.data.bos_id is 257", "below config.model.vocab_size 257"),
    ("data", {"bos_id": 1, "bos_is_zero": True}, "config.data.bos_id is 1", "0 where config.data.bos_is_zero is True"),
    ("data", {"bos_id": -1}, "config.data.bos_id is -1", "at least 0"),
    ("data", {"num_workers": -1}, "config.data.num_workers is -1", "at least 0"),
    ("mesh", {"data": -1}, "config.mesh.data is -1", "at least 0"),
    ("mesh", {"model": 0}, "config.mesh.model is 0", "at least 1"),
    ("checkpoint", {"keep": 0}, "config.checkpoint.keep is 0", "at least 1"),
    ("log", {"every_steps": 0}, "config.log.every_steps is 0", "at least 1"),
    ("eval", {"batch_size": 0}, "config.eval.batch_size is 0", "at least 1"),
]


@pytest.mark.parametrize("section, fields, named", [(s, f, n) for s, f, *n in BAD], ids=lambda value: str(value)[:60])
def test_bad_input_is_answered_by_one_line_that_names_the_field_the_value_and_what_is_legal(section, fields, named):
    message = error_of({section: fields})
    for part in named:
        assert part in message


def test_a_config_file_may_hold_a_config_dict_with_a_mistake_in_it():
    config = default_config()
    config.unlock()
    config.model.num_layer = 4
    assert "'num_layer'" in error_of(config)
    assert "'hidden'" in error_of(ConfigDict({"hidden": {}}))


def test_suggestion_is_the_nearest_name_or_all_of_them():
    assert suggestion("sead", ["seed", "keep"]) == "did you mean 'seed'?"
    assert suggestion("x", ["seed", "keep"]) == "legal: seed, keep"


@pytest.mark.parametrize("value, legal", [(1, 1.0), (0, 0.0), (1.5, 1.5)])
def test_numbers_become_floats_where_a_field_is_a_float(value, legal):
    made = from_config_dict({"inner": {"learning_rate": value}}).inner.learning_rate
    assert made == legal and type(made) is float


@pytest.mark.parametrize("value, legal", [(8.0, 8), (8, 8), (1e2, 100)])
def test_whole_numbers_become_integers_where_a_field_is_an_integer(value, legal):
    made = from_config_dict({"model": {"intermediate_size": value}}).model.intermediate_size
    assert made == legal and type(made) is int


def test_values_are_read_before_they_are_derived_from():
    config = from_config_dict({"model": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}})
    assert (config.model.head_dim, config.model.num_key_value_heads) == (16, 2)
    config = from_config_dict({"model": {"num_attention_heads": 3, "head_dim": 6}})  # 3 does not divide 128
    assert config.model.head_dim == 6


@pytest.mark.parametrize(
    "model, mixers, windows",
    [
        ({}, ("attention",), ()),
        ({"sliding_window": 16}, ("window",), (16,)),
        ({"sliding_window": 16, "mixer": "window,attention"}, ("window", "attention"), (16,)),
        ({"sliding_window": 16, "mixer": "attention", "num_fast_blocks": 3}, ("attention",), ()),
    ],
)
def test_mixers_of_the_pattern(model, mixers, windows):
    config = from_config_dict({"model": model}).model
    assert (config.mixers, config.windows) == (mixers, windows)


def test_a_mixer_pattern_repeats_over_all_blocks():
    model = {"sliding_window": 16, "mixer": "window,attention", "num_fast_blocks": 1}
    assert from_config_dict({"model": model}).model.num_prefix_blocks == 3
    assert "divides the 3 blocks" in error_of({"model": {**model, "num_hidden_layers": 3}})


@st.composite
def legal_values(draw):
    """A legal config of every section, most of its values drawn."""
    rate = st.floats(0, 10)
    heads, mini_batch, accumulation = (draw(st.integers(1, 8)) for _ in range(3))
    layers, warmup = draw(st.integers(1, 12)), draw(st.integers(0, 50))
    model = {
        "vocab_size": draw(st.integers(2, 1000)),
        "hidden_size": 2 * heads * draw(st.integers(1, 8)),
        "intermediate_size": draw(st.integers(1, 64)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([0, 1, heads])),
        "head_dim": draw(st.sampled_from([0, 2, 8])),
        "sliding_window": draw(st.integers(0, 64)),
        "rope_style": draw(st.sampled_from(["interleaved", "half"])),
        "tie_word_embeddings": draw(st.booleans()),
        "num_fast_blocks": draw(st.integers(0, layers)),
        "fast_intermediate_size": draw(st.integers(0, 64)),
        "compute_dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "mixer": draw(st.sampled_from(["", "attention"])),
    }
    inner = {
        "mini_batch_size": mini_batch,
        "learning_rate": draw(rate),
        "clip_norm": draw(rate),
        "warmup_steps": draw(st.integers(0, 9)),
        "gradient": draw(st.sampled_from(["reference", "first_order"])),
    }
    train = {
        "seq_len": mini_batch * draw(st.integers(1, 9)),
        "global_batch_size": accumulation * draw(st.integers(1, 9)),
        "accumulation_steps": accumulation,
        "num_steps": draw(st.integers(warmup + 1, 100)),
        "init_from": draw(st.text(max_size=9)),
    }
    optimizer = {
        "learning_rate": draw(rate),
        "warmup_steps": warmup,
        "decay_steps": draw(st.sampled_from([0, 200])),
        "b1": draw(st.floats(0, 1, exclude_max=True)),
        "train_only": draw(st.text(max_size=9)),
    }
    data = {"path": draw(st.text(max_size=9)), "bos_id": draw(st.integers(0, 1)), "shuffle": draw(st.booleans())}
    return {"model": model, "inner": inner, "train": train, "optimizer": optimizer, "data": data}


@given(values=legal_values())
def test_a_config_survives_its_dict_and_config_json(values):
    config = from_config_dict(values)
    assert from_config_dict(to_dict(config)) == config
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_config_dict(ConfigDict(to_dict(config))) == config


@given(values=legal_values())
def test_every_value_given_is_kept_unless_it_asks_to_be_derived(values):
    made = to_dict(from_config_dict(values))
    derived = {"num_key_value_heads", "head_dim", "fast_intermediate_size", "decay_steps"}
    for section, fields in values.items():
        for name, value in fields.items():
            if value == 0 and name in derived:
                assert made[section][name] > 0
            else:
                assert made[section][name] == value


def test_a_config_is_frozen_and_hashable():
    config = from_config_dict({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 8
    assert hash(config) == hash(from_config_dict({}))
