"""What the fuzz tests share: how examples are drawn, and what a command may answer, and what files suffer."""

import contextlib
import io
import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ttt_e2e.cli import main


def fuzz(max_examples: int) -> settings:
    """The same examples in every run; a database of failures would make runs differ."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=max_examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow
    )


def refusal(*argv) -> str:
    """Runs a command in this process: the one line with which it refuses bad input, "" where it takes it."""
    stderr, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        code = main([str(argument) for argument in argv])
    if code == 0:
        return ""
    lines = [line for line in stderr.getvalue().split("\n") if line and "%|" not in line]
    assert code == 2, (code, lines)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and len(lines[0]) > len("error: "), lines
    return lines[0]


# ---------------------------------------------------------------------------------------------------- damaged files
def places():
    """Where in a file, or in a JSON tree: a fraction of the way."""
    return st.floats(0, 1, exclude_max=True)


JUNK = (
    *(b"", b"{", b"{}", b"[]", b"null", b"0", b'""', b"\xff\xfe", b"\0" * 64, b"garbage" * 40, b"[" * 100_000),
    *(b'{"zarr_format": 3}', b'{"zarr_format": 2, "node_type": "group"}', b'{"zarr_format": 3, "node_type": "array"}'),
    *(b'{"zarr_format": 3, "node_type": "group", "attributes": 3}', b'{"zarr_format": NaN}', b'{"a": "\xc3"}'),
)
WORDS = ("", "x", "uint8", "uint16", "uint32", "uint64", "int32", "float32", "big", "gzip", "default", "bytes", "group")
NUMBERS = (0, 1, 2, 7, 31, 99, 100, 200, 256, 288, 290, 300, 321, 10**6, 2**31, 2**40, 2**62, 2**64, 10**30, -1)
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(
        (None, True, False, 0.5, 1e300, float("nan"), float("inf"), [], {}, [[]], [1, 2], {"name": "x"}, [0])
    ),
    st.lists(st.sampled_from(NUMBERS), max_size=2),
)


def mutations(files, metadata):
    """(what is done, to which of the files, details); `metadata` are those that hold JSON."""
    file, metadata = st.sampled_from(files), st.sampled_from(metadata)
    return st.one_of(
        st.tuples(st.just("cut"), file, places()),
        st.tuples(st.just("extend"), file, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("flip"), file, st.tuples(places(), st.integers(0, 7))),
        st.tuples(st.just("flip"), metadata, st.tuples(places(), st.integers(0, 7))),
        st.tuples(st.just("fill"), file, st.one_of(st.sampled_from(JUNK), st.binary(max_size=60))),
        st.tuples(st.sampled_from(("delete", "directory", "loop", "rename")), file, st.none()),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("json"), metadata, st.tuples(places(), VALUES)),
        st.tuples(st.just("drop"), metadata, places()),
    )


def paths_of(tree, path=()):
    """The path of every value in a JSON tree but the whole."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


def change_json(content: bytes, place: float, change) -> bytes:
    """The JSON with one of its values changed: `change(holder, key)`."""
    tree = json.loads(content)
    paths = list(paths_of(tree))
    *path, key = paths[int(place * len(paths))]
    holder = tree
    for step in path:
        holder = holder[step]
    change(holder, key)
    return json.dumps(tree).encode()


def mutate(root, kind: str, name: str, details) -> None:
    """Does it to a file of the directory `root`."""
    file = root / name
    content = file.read_bytes()
    if kind == "cut":
        file.write_bytes(content[: int(details * len(content))])
    elif kind == "extend":
        file.write_bytes(content + details)
    elif kind == "flip":
        place = int(details[0] * len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << details[1]]) + content[place + 1 :])
    elif kind == "fill":
        file.write_bytes(details)
    elif kind == "json":
        file.write_bytes(change_json(content, details[0], lambda holder, key: holder.__setitem__(key, details[1])))
    elif kind == "drop":
        file.write_bytes(change_json(content, details, lambda holder, key: holder.__delitem__(key)))
    elif kind == "rename":
        file.rename(file.with_name(f"{file.name}.old"))
    else:
        file.unlink()
        if kind == "directory":
            file.mkdir()
        elif kind == "loop":
            file.symlink_to(file)
