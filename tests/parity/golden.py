"""Golden cases: numbers that the released TTT-E2E implementation produced on small random models.

A case is a folder of `tests/data`: `case.json` (sizes and hyperparameters), `golden.npz` (tokens, losses, gradients,
parameters), `tokens.zarr` (the same tokens as a released dataset) and for some `checkpoint/` (the initial parameters
as that implementation saves them).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ttt_e2e.config import Config, from_config_dict
from ttt_e2e.interop.official import from_official
from ttt_e2e.model import abstract_model

DATA = Path(__file__).parents[1] / "data"
CASES = ("e2e_tied", "e2e_untied", "e2e_noclip", "full_attention")
TRAINED_CASES = ("e2e_tied", "e2e_untied", "full_attention")  # those with six outer steps and a checkpoint
NUM_OUTER_STEPS = 6


@dataclass(frozen=True)
class Case:
    """One golden case, in our configuration and parameter layout."""

    path: Path
    config: Config
    graphdef: Any
    params: dict  # {"fast": ..., "slow": ...}, the initial ones
    tokens: np.ndarray  # [sequences, T + 1]
    # "token_nll" [sequences, T], "mini_batch_loss" [sequences, T/b], "loss" [sequences], "gradient" (like `params`, of
    # the first sequence's loss); of TRAINED_CASES also "train_loss", "train_grad_norm" [6] and "final_params".
    expected: dict

    def batch(self, step: int) -> np.ndarray:
        """Tokens [B, T + 1] of an outer step."""
        B = self.config.train.global_batch_size
        return self.tokens[(step * B + np.arange(B)) % len(self.tokens)]


@cache
def load_case(name: str) -> Case:
    """The case in folder `name` of `tests/data`."""
    path = DATA / name
    config = case_config(path)
    graphdef, _ = abstract_model(config.model)

    with np.load(path / "golden.npz") as golden:
        arrays = dict(golden)

    def tree(prefix: str):
        theirs = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
        return from_official(theirs, config.model)

    expected = {
        "token_nll": arrays["token_nll"],
        "mini_batch_loss": arrays["chunk_loss"],
        "loss": arrays["loss"],
        "gradient": tree("grad/"),
    }
    if name in TRAINED_CASES:
        expected |= {key: arrays[key] for key in ("train_loss", "train_grad_norm")}
        expected["final_params"] = tree("final_param/")
    return Case(path, config, graphdef, tree("param/"), arrays["tokens"], expected)


def case_config(path: Path) -> Config:
    """The configuration that `case.json` describes; its data are the case's own token store, in order."""
    case = json.loads((path / "case.json").read_text())
    outer = case["outer"]
    assert outer["init_lr"] == 0  # ours always warms up from 0
    return from_config_dict(
        {
            "model": {
                "vocab_size": case["vocab_size"],
                "hidden_size": case["hidden_size"],
                "intermediate_size": case["intermediate_size"],
                "num_hidden_layers": case["num_layers"],
                "num_attention_heads": case["num_heads"],
                "sliding_window": case["window_size"] if case["attention"] == "SWA" else 0,
                "rope_theta": case["rope_theta"],
                "rms_norm_eps": case["rms_norm_eps"],
                "tie_word_embeddings": case["tie_word_embeddings"],
                "num_fast_blocks": case["suffix_len"],
            },
            "inner": {
                "mini_batch_size": case["mini_batch_size"],
                "learning_rate": case["inner_lr"],
                "clip_norm": case["inner_clip"],
                "warmup_steps": case["ilr_warmup_steps"],
                "warmup_init": case["ilr_init"],
            },
            "train": {
                "seq_len": case["seq_len"],
                "global_batch_size": case["global_batch_size"],
                "num_steps": NUM_OUTER_STEPS,
            },
            "optimizer": {
                "learning_rate": outer["lr"],
                "end_learning_rate": outer["end_lr"],
                "warmup_steps": outer["lr_warmup_steps"],
                "decay_steps": outer["lr_decay_steps"],
                "b1": outer["b1"],
                "b2": outer["b2"],
                "weight_decay": outer["weight_decay"],
                "clip_norm": outer["clip_gradient"],
            },
            "data": {"path": str(path / "tokens.zarr"), "bos_id": case["bos"], "shuffle": False},
        }
    )
