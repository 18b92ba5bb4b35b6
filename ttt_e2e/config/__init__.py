"""The configuration of a run: frozen dataclasses, made from a ConfigDict after checking that every value is legal."""

from ttt_e2e.config.fields import each_field, suggestion
from ttt_e2e.config.sections import (
    ATTENTION_BACKENDS,
    MIXER_SECTIONS,
    MIXERS,
    OPTIMIZERS,
    REMATS,
    TRAJECTORIES,
    CheckpointConfig,
    Config,
    DataConfig,
    EngramConfig,
    EvalConfig,
    InnerConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from ttt_e2e.config.validation import as_dict, default_config, from_config_dict, to_dict

__all__ = [
    "ATTENTION_BACKENDS",
    "MIXERS",
    "MIXER_SECTIONS",
    "OPTIMIZERS",
    "REMATS",
    "TRAJECTORIES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngramConfig",
    "EvalConfig",
    "InnerConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "as_dict",
    "default_config",
    "each_field",
    "from_config_dict",
    "suggestion",
    "to_dict",
]
