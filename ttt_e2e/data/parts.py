"""Divides a corpus into parts that are prepared apart, and merges their stores into one that refers to them."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_e2e.data.documents import Corpus
from ttt_e2e.data.store import read_attributes, write_attributes
from ttt_e2e.data.tokenizers import files_of
from ttt_e2e.errors import UserError
from ttt_e2e.paths import is_url

SPLITS = ("train", "val")


def numbers_of(part: str) -> tuple[int, int]:
    """The numbers I and N of a part "I/N". Raises UserError where it is none."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"part {part!r}: legal: I/N with I from 0 to N - 1, as in 0/4")
    return int(match[1]), int(match[2])


def check_part(part: str, corpus: Corpus) -> None:
    """Raises UserError where `part` is no "I/N", or a corpus has fewer than N files."""
    _, count = numbers_of(part)
    if count > (files := len(corpus.files)):
        raise UserError(f"part {part}: parts have whole files, and the input has {files}; legal: N up to that")


def part_of(corpus: Corpus, part: str) -> Corpus:
    """The files of `corpus` in the part "I/N", about an Nth of the bytes; all of them where `part` is "".

    Files stay whole and in their order, so that the parts one after the other are the corpus.
    """
    if not part:
        return corpus
    index, count = numbers_of(part)
    sizes = corpus.sizes()
    total, before, ours = sum(sizes) or 1, 0, []
    for file, size in zip(corpus.files, sizes):
        if min((2 * before + size) * count // (2 * total), count - 1) == index:
            ours.append(file)
        before += size
    # The files that nobody reads are those of the corpus: the first part says so.
    return dataclasses.replace(corpus, files=tuple(ours), left_out=corpus.left_out if index == 0 else {})


def contents_digest(corpus: Corpus, held_out: Corpus | None, part: str) -> str:
    """Digest, 16 hex digits, of the names and contents of the files of a part, which add up to those of the whole.

    Reads all of them, which takes far less time than to tokenize them. Raises UserError where one cannot be read.
    """
    total = 0
    for each in filter(None, (corpus, held_out)):
        for path, name in part_of(each, part).files:
            digest = hashlib.blake2b(f"{each is held_out}\0{name}\0".encode("utf-8", "surrogateescape"), digest_size=8)
            try:
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"input {path}: cannot be read ({error.strerror or error})") from None
            total += int(digest.hexdigest(), 16)
    return _hex(total)


def _hex(total: int) -> str:
    return f"{total % 2**64:016x}"


def is_same(setting: str, ours, theirs) -> bool:
    """Whether two values of a setting of `prepare` mean the same: paths may be written in several ways.

    A tokenizer that is a file is known by the digest of files, wherever it lies.
    """
    if setting in ("input", "val_input"):
        return _places(ours) == _places(theirs)
    if setting == "tokenizer" and ours and ours.endswith((".model", ".json")):
        return bool(theirs) and theirs.endswith((".model", ".json"))
    return ours == theirs


def _places(inputs: str | None) -> list[str]:
    """The absolute paths of inputs with commas between them."""
    return [os.path.realpath(os.path.expanduser(path)) for path in (inputs or "").split(",") if path]


def merged_attributes(stores: Sequence[str | os.PathLike], output: Path) -> dict[str, Any]:
    """The attributes of a store at `output` that is the parts at `stores` one after the other, by their numbers.

    Raises UserError where a store is no part, or they are not all parts of one corpus, each once.
    """
    parts = {}
    for store in map(os.fspath, stores):
        if is_url(store):
            raise UserError(f"merge {store}: legal: local directories; copy the parts and the merged store together")
        attributes = read_attributes(store)
        part = attributes.get("prepared_from", {}).get("part")
        if not part:
            raise UserError(f"merge {store}: no part of a corpus; legal: stores made by ttt-e2e prepare --part=I/N")
        index, count = numbers_of(part)
        if index in parts:
            raise UserError(f"merge {store}: part {part}, as {parts[index][0]}; legal: each part once")
        parts[index] = store, attributes, count
    first, expected, count = parts[min(parts)]
    for store, attributes, _ in parts.values():
        _check_alike(store, attributes, first, expected)
    if missing := sorted(set(range(count)) - set(parts)):
        raise UserError(f"merge: part {missing[0]}/{count} is missing; legal: all {count} parts")
    ordered = [parts[index][:2] for index in range(count)]
    return _merged(ordered, output)


def _check_alike(store: str, attributes: dict, first: str, expected: dict) -> None:
    """Raises UserError where two parts were prepared with different settings."""
    ours, theirs = (dict(each["prepared_from"]) for each in (attributes, expected))
    for settings in (ours, theirs):
        settings["number of parts"] = numbers_of(settings.pop("part"))[1]
        settings.pop("contents", None)  # of its own files
    for name in theirs:
        if not is_same(name, ours.get(name), theirs[name]):
            raise UserError(f"merge {store}: {name} {ours.get(name)!r}, but {first} has {theirs[name]!r}")


def _merged(parts: list[tuple[str, dict]], output: Path) -> dict[str, Any]:
    """The attributes of the store that `parts` make one after the other; each is its path and attributes."""
    all_attributes = [attributes for _, attributes in parts]

    def total(name: str) -> dict[str, int]:
        return {split: sum(attributes[name][split] for attributes in all_attributes) for split in SPLITS}

    digests = {split: [attributes["digest"][split] for attributes in all_attributes] for split in SPLITS}
    digest = {
        split: hashlib.blake2b("".join(each).encode(), digest_size=8).hexdigest() for split, each in digests.items()
    }
    first = all_attributes[0]
    about = {name: first[name] for name in ("tokenizer", "vocab_size", "bos_id")}
    counts = {"num_documents": total("num_documents"), "num_tokens": total("num_tokens"), "digest": digest}
    refer = [
        {
            "path": Path(os.path.relpath(store, output)).as_posix(),
            "num_tokens": attributes["num_tokens"],
            "digest": attributes["digest"],
        }
        for store, attributes in parts
    ]
    left_out = [attributes["left_out"] for attributes in all_attributes]
    settings = first["prepared_from"] | {"part": ""}
    contents = [attributes["prepared_from"].get("contents", "") for attributes in all_attributes]
    if all(contents):
        settings["contents"] = _hex(sum(int(each, 16) for each in contents))
    return about | counts | {"left_out": _sum(left_out), "parts": refer, "prepared_from": settings}


def _sum(left_out: list[dict]) -> dict[str, Any]:
    """What parts left out, together."""
    total = {name: sum(each[name] for each in left_out) for name in left_out[0] if isinstance(left_out[0][name], int)}
    files = {name: number for each in left_out for name, number in each["files"].items()}
    first = next((each["first_bad_record"] for each in left_out if "first_bad_record" in each), None)
    return {"files": files, **total} | ({"first_bad_record": first} if first else {})


def write_merged(attributes: dict[str, Any], output: Path, directory: Path) -> None:
    """Writes into `directory` the store that is to be at `output`, with the attributes of `merged_attributes`."""
    for split, number in attributes["num_documents"].items():
        if not number:
            raise UserError(f"merge: the parts have no document of the split {split!r}")
    if attributes["tokenizer"] != "bytes":
        first = os.path.normpath(output / attributes["parts"][0]["path"])
        for file in files_of(f"{first}/{attributes['tokenizer']}"):
            (directory / file.name).write_bytes(file.read_bytes())
    write_attributes(directory, attributes)
