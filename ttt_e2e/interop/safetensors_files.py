"""The tensors of a directory of safetensors files, one or several with an index. Nothing of them is executed."""

from pathlib import Path

import numpy as np

from ttt_e2e.errors import UserError, first_line
from ttt_e2e.runs.files import read_json
from ttt_e2e.strict_json import to_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_FILE_BYTES = 5_000_000_000  # of a file that is written


class Tensors:
    """Reads tensors by name; opens each file once, and reads no more of it than is asked for."""

    def __init__(self, directory: Path):
        """Opens all files of the directory.

        Raises:
          UserError: there are none, one is missing or damaged, or the package safetensors is.
        """
        safe_open = _library().safe_open
        self.directory, self._files = directory, {}
        names = _file_names(directory)
        for name in sorted(set(names.values()) if isinstance(names, dict) else names):
            path = directory / name
            if not path.is_file():
                raise UserError(f"{directory / INDEX} names {name}, which is missing: the download is not complete")
            try:
                file = safe_open(str(path), framework="np")
                self._files |= {tensor: (path, file) for tensor in file.keys()}  # noqa: SIM118 (it is no dict)
            except Exception as error:  # the library raises an exception of its own for any damage
                reason = not_downloaded(path) or first_line(error)
                raise UserError(f"{path} is no whole safetensors file: {reason}") from None
        for tensor in names if isinstance(names, dict) else ():
            if tensor not in self._files:
                raise UserError(f"{directory / names[tensor]} has no tensor {tensor!r}, which {INDEX} names")

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name][1].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, as safetensors name it: "F32", "BF16", ..."""
        return self._files[name][1].get_slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""
        path, file = self._files[name]
        try:
            return file.get_slice(name)[index]
        except Exception as error:
            raise UserError(f"{path}: tensor {name!r} cannot be read: {first_line(error)}") from None


def write(directory: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """Writes tensors into one file, or if they are large into several with an index.

    tensors: {name: (shape, dtype, function that makes the array)}; an array is made when its file is written.
    """
    save_file = _library("numpy").save_file
    shards, size = [[]], 0
    for name, (shape, dtype, _) in tensors.items():
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if shards[-1] and size + num_bytes > MAX_FILE_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    files = {}
    for i, names in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        arrays = {name: tensors[name][2]() for name in names}
        try:
            save_file(arrays, str(directory / file), metadata)
        except Exception as error:  # the library raises an exception of its own where the disk is full
            raise UserError(f"{directory / file} cannot be written: {first_line(error)}") from None
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (directory / INDEX).write_text(to_json({"metadata": metadata, "weight_map": files}, indent=2) + "\n")


def _file_names(directory: Path) -> dict[str, str] | list[str]:
    """{tensor: its file} of the index, or the one file. Raises `UserError` where there is neither."""
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{directory / INDEX} has no weight_map")
        if wrong := [name for name in index.values() if not isinstance(name, str)]:
            raise UserError(f"{directory / INDEX}: its weight_map names {wrong[0]!r}, but it takes names of files")
        return index
    if (directory / SINGLE).is_file():
        return [SINGLE]
    others = sorted(path.name for path in directory.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    found = f"; {others[0]} is not read, as it is no safetensors file" if others else ""
    if unfinished := sorted(path.name for path in directory.rglob("*.incomplete")):
        found = f"; {unfinished[0]} says that the download is not complete"
    raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}{found}")


def not_downloaded(path: Path) -> str:
    """Says what a file is that stands in place of the one to be downloaded; "" where it is none of these."""
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file, which `git lfs pull` fetches"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page in place of the file: download it as a user who was granted access to the model"
    return ""


def _library(module: str = ""):
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed: pip install 'ttt-e2e[huggingface]'") from None
    return getattr(safetensors, module) if module else safetensors
