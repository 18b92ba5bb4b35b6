"""`config.json` of Hugging Face models, and the `config.model` that computes the same; both ways.

Llama, SmolLM, Mistral, Qwen 2 and Qwen 3, in the forms of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`)
and 5 (`rope_parameters`, `dtype`). What a model has that ours does not compute is refused by name.
"""

from ttt_e2e.config import ModelConfig
from ttt_e2e.config.fields import coerce, require
from ttt_e2e.errors import UserError

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SAME = (*SIZES, "rms_norm_eps", "initializer_range")  # fields that mean the same
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = {"full_attention": "attention", "sliding_attention": "window"}
MUST_BE = {"hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
INTEGERS = ("num_key_value_heads", "head_dim", "sliding_window", "max_window_layers", "max_position_embeddings")
FLOATS = ("rms_norm_eps", "initializer_range", "rope_theta")


def to_model(theirs: dict) -> dict:
    """Makes the fields of `config.model` from the contents of a `config.json`.

    Raises:
      UserError: the architecture, its activation, its RoPE or another feature is not supported; the message names the
        field, its value and what is legal.
    """
    kind = _get(theirs, "model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"config.json: model_type is {kind!r}, but it must be one of {', '.join(MODEL_TYPES)}")
    for name, legal in MUST_BE.items():
        if theirs.get(name) not in (None, legal):
            raise UserError(f"config.json: {name} is {theirs[name]!r}, but it must be {legal!r}")
    if theirs.get("quantization_config"):
        raise UserError("config.json has a quantization_config, but weights must be floats: dequantize them first")
    theirs = theirs | _numbers(theirs)
    bias = theirs.get("attention_bias", False)
    if bias and kind != "qwen2":
        raise UserError(f"config.json: attention_bias is {bias!r}, but only qwen2 may have biases, of q, k and v")
    model = {name: _get(theirs, name) for name in SAME if name in theirs or name not in ("initializer_range",)}
    heads = model["num_attention_heads"]
    model |= {
        "num_key_value_heads": theirs.get("num_key_value_heads") or heads,
        "head_dim": theirs.get("head_dim") or model["hidden_size"] // heads,
        "tie_word_embeddings": bool(theirs.get("tie_word_embeddings", False)),
        "attention_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "post_norm": False,
        "rope_style": "half",
    }
    return model | _rope(theirs) | _windows(theirs, kind, model["num_hidden_layers"])


def from_model(model: ModelConfig) -> dict:
    """Makes a `config.json` of transformers 5 for a model without fast MLPs and sinks: the inverse of `to_model`.

    Raises:
      UserError: transformers has no model that computes the same.
    """
    kinds = model.mixers * (model.num_hidden_layers // len(model.mixers))
    if other := sorted(set(kinds) - set(LAYERS.values())):
        raise UserError(f"config.model.mixer names {other[0]!r}, which transformers has in none of these models")
    if model.engram.blocks:
        raise UserError(f"config.model.engram.blocks is {model.engram.blocks!r}, but transformers has no Engram")
    if model.post_norm:
        raise UserError("config.model.post_norm is True, which transformers has in none of these models")
    if model.qk_norm and model.attention_bias:
        raise UserError("config.model has qk_norm and attention_bias, which transformers has in none of these models")
    layer_types = [name for kind in kinds for name, ours in LAYERS.items() if ours == kind]
    same = len(set(layer_types)) == 1
    windows = "sliding_attention" in layer_types
    kind = "qwen3" if model.qk_norm else "qwen2" if model.attention_bias else "mistral" if windows else "llama"
    if kind == "mistral" and not same:
        raise UserError(
            "config.model.mixer has window and full attention, which transformers has in models with qk_norm or "
            "attention_bias only"
        )
    theirs = {name: getattr(model, name) for name in SAME}
    theirs |= {
        "architectures": [{"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(kind, kind.capitalize()) + "ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.tie_word_embeddings,
        "sliding_window": model.sliding_window if windows else None,
        "dtype": model.param_dtype,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
    }
    if kind in ("qwen2", "qwen3"):
        theirs |= {"layer_types": layer_types, "use_sliding_window": windows}
    if kind in ("llama", "qwen3"):
        theirs["attention_bias"] = False
    if model.rope_scaling_factor:
        theirs["rope_parameters"] |= {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_positions,
        }
    return theirs


def _get(theirs: dict, name: str):
    if theirs.get(name) is None:
        raise UserError(f"config.json has no {name!r}")
    return theirs[name]


def _numbers(theirs: dict) -> dict:
    """The numbers among the fields of a `config.json`, in their types. Raises `UserError` for one that is none."""
    given = {name: value for name, value in theirs.items() if value is not None}
    if isinstance(bos_ids := given.get("bos_token_id"), list):
        given["bos_token_id"] = bos_ids[0] if bos_ids else 0
    numbers = {name: coerce(f"config.json: {name}", given[name], float) for name in FLOATS if name in given}
    for name in sorted(given.keys() & {*SIZES, *INTEGERS, "bos_token_id"}):
        least = 1 if name in SIZES else 0
        numbers[name] = coerce(f"config.json: {name}", given[name], int)
        require(numbers[name] >= least, f"config.json: {name}", numbers[name], f"at least {least}")
    return numbers


def _rope(theirs: dict) -> dict:
    """The fields of RoPE, from `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    name = "rope_parameters" if theirs.get("rope_parameters") else "rope_scaling"
    rope = theirs.get(name) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"config.json: {name} is {rope!r}, but it must be one object of numbers for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    given = {key: coerce(f"config.json: {name}.{key}", rope[key], float) for key in names if rope.get(key) is not None}
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"config.json: {name}.partial_rotary_factor is {rope['partial_rotary_factor']!r}, but it must be 1"
        )
    fields = {"rope_theta": given.get("rope_theta", theirs.get("rope_theta", 10_000.0))}
    if kind == "llama3":
        for key in names[1:]:
            if key not in given:
                raise UserError(f"config.json: {name} has no {key!r}")
        return fields | {
            "rope_scaling_factor": given["factor"],
            "rope_low_freq_factor": given["low_freq_factor"],
            "rope_high_freq_factor": given["high_freq_factor"],
            "rope_original_positions": int(given["original_max_position_embeddings"]),
        }
    if kind != "default":
        raise UserError(f"config.json: {name}.rope_type is {kind!r}, but it must be 'default' or 'llama3'")
    return fields


def _windows(theirs: dict, kind: str, num_layers: int) -> dict:
    """The mixers of the blocks, and their window."""
    window = theirs.get("sliding_window")
    used = theirs.get("use_sliding_window", kind == "mistral") and window
    layers = theirs.get("layer_types")
    if not layers:  # transformers 4: layers from `max_window_layers` on have the window
        first = 0 if kind == "mistral" else theirs.get("max_window_layers", num_layers)
        layers = ["sliding_attention" if used and i >= first else "full_attention" for i in range(num_layers)]
    if not isinstance(layers, list):
        raise UserError(f"config.json: layer_types is {layers!r}, but it must be a list, of one entry for each layer")
    if unknown := [layer for layer in layers if layer not in list(LAYERS)]:
        raise UserError(f"config.json: layer_types has {unknown[0]!r}, but it may have {' and '.join(LAYERS)}")
    if len(layers) != num_layers:
        raise UserError(f"config.json: layer_types has {len(layers)} layers, but num_hidden_layers is {num_layers}")
    mixers = [LAYERS[layer] for layer in layers]
    if "window" not in mixers:
        return {"sliding_window": 0, "mixer": ""}
    if not window:
        raise UserError("config.json: layer_types has 'sliding_attention', but sliding_window is not given")
    period = next(n for n in range(1, num_layers + 1) if mixers == mixers[:n] * (num_layers // n))
    return {"sliding_window": int(window), "mixer": "" if period == 1 else ",".join(mixers[:period])}
