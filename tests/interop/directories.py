"""Directories of models of Hugging Face, for tests to change, and what a refused import leaves."""

import shutil
from pathlib import Path

import pytest

from ttt_e2e.errors import UserError
from ttt_e2e.interop import huggingface

safetensors = pytest.importorskip("safetensors.numpy")

DATA = Path(__file__).parents[1] / "data" / "huggingface"


def damaged(tmp_path, case="llama3_scaled_rope") -> Path:
    shutil.copytree(DATA / case / "model", tmp_path / "model")
    return tmp_path / "model"


def change_tensors(directory, change) -> None:
    tensors = safetensors.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, directory / "model.safetensors")


def refused(directory, tmp_path, message, overrides=()) -> None:
    with pytest.raises(UserError, match=message) as error:
        huggingface.import_model(directory, tmp_path / "run", list(overrides))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
