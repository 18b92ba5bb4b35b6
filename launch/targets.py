"""Compiles every configuration of configs/paper.py for the smallest slices that it fits, and makes the tables.

    python launch/targets.py --output=runs/targets --match='h100|h200'      (with the extra targets-cuda)
    python launch/targets.py --output=runs/targets --match='v5p|v6e'        (with the extra targets-tpu)
    python launch/targets.py --output=runs/targets --tables                 (with the extra plot)

It compiles one configuration at a time, each in a process of its own, for larger and larger slices until one fits.
Started again, it leaves out those that have a result. What the output directory holds:

    CONFIG@TARGET@MESH/     results of `ttt-e2e bench target`, and its output in log.txt
    tables.md, *.png        tables and plot of all results there (docs/targets.md)
"""

import logging
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from absl import flags

from ttt_e2e import streams
from ttt_e2e.bench import target_tables
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, parse, path
from ttt_e2e.paths import check_local
from ttt_e2e.runs.files import parse_json, read_text

logger = logging.getLogger("ttt_e2e.targets")

PAPER = Path(__file__).parents[1] / "configs" / "paper.py"
SIZES, KINDS, CONTEXTS = ("125m", "350m", "760m", "1b", "3b"), ("e2e", "full", "swa"), ("8k", "32k", "128k")
H100 = tuple(f"h100:{n}" for n in (1, 8, 16, 32, 64, 128))
V5P = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4")
V6E = ("v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16")
# Sequences that a device reads at a time, by (context, size). One for all others, which are longer or larger.
AT_ONCE = {("8k", "125m"): 4, ("8k", "350m"): 4, ("8k", "760m"): 2, ("8k", "1b"): 2}
REPRODUCED = ("125m-e2e-8k", "125m-full-8k")  # publicly reproduced, on 8 H200s


class Case(NamedTuple):
    """A configuration to compile for a slice, with its mesh."""

    config: str  # argument of configs/paper.py
    target: str
    data: int
    model: int
    accumulation_steps: int

    @property
    def name(self) -> str:
        """Name of the case's directory: CONFIG@TARGET@MESH."""
        return f"{self.config}@{self.target.replace(':', '-')}@{self.data}x{self.model}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if every case that matches has a result, 1 otherwise, 2 after bad input."""
    return streams.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    """Logs to stderr, and prints an error that the user can mend as one line; returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("ttt_e2e").setLevel(logging.INFO)
    try:
        return _main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    """Compiles the cases or makes the tables, as the flags say; returns 0 or 1. Raises `UserError` for bad input."""
    values, _ = parse(argv, _define, "launch/targets.py: compile the paper's configurations for absent accelerators.")
    if not values.output:
        raise UserError("--output is missing: a directory for the results")
    check_local("--output", values.output)
    output = Path(values.output)
    if values.tables:
        print(target_tables.write(output))
        return 0
    missing = [search for ladder in ladders() if (search := climb(ladder, output, values.match))]
    for name in missing:
        logger.info("%s: no result; its log.txt says why", name)
    return bool(missing)


def _define(values: flags.FlagValues) -> None:
    path(values, "output", "Directory for the results.")
    flags.DEFINE_string("match", "", "Only cases whose CONFIG@TARGET@MESH this matches somewhere.", flag_values=values)
    flags.DEFINE_boolean("tables", False, "Make the tables of what is there, and compile nothing.", flag_values=values)


def ladders() -> list[list[Case]]:
    """For every configuration and accelerator, the list of cases to try, smallest slice first."""
    names = [f"{size}-{kind}-{context}" for size in SIZES for context in CONTEXTS for kind in KINDS]
    rungs = [(name, H100) for name in names]
    rungs += [(name, ("h200:8",)) for name in REPRODUCED]
    rungs += [(name, slices) for slices in (V5P, V6E) for name in names if name.startswith("3b")]
    return [[case for target in targets if (case := make_case(name, target))] for name, targets in rungs]


def make_case(name: str, target: str) -> Case | None:
    """The case of a configuration on a slice, with the recipe's batch; None if there are over 8 devices to a sequence.

    The mesh axis `data` divides the sequences as far as they go; `model` takes the devices that are left.
    """
    size = 1
    for factor in re.findall(r"\d+", target.partition(":")[2]):
        size *= int(factor)
    model_size, _, context = name.split("-")
    batch = batch_of(name)
    data = min(size, batch)
    if size // data > 8:
        return None
    at_once = min(AT_ONCE.get((context, model_size), 1), batch // data)
    return Case(name, target, data, size // data, batch // (data * at_once))


@cache
def batch_of(name: str) -> int:
    """Global batch size of a configuration, in sequences."""
    return load_config_file(f"{PAPER}:{name}").train.global_batch_size


def climb(ladder: list[Case], output: Path, match: str = "") -> str:
    """Compiles a ladder's cases that match until one fits. Returns the name of a case without a result, or ""."""
    for case in ladder:
        if not re.search(match, case.name):
            continue
        directory = output / case.name
        if not (directory / "results.json").exists() and not compile_case(case, directory):
            return case.name
        results = directory / "results.json"
        if parse_json(read_text(results), results)[0]["fits"]:
            return ""
    return ""


def compile_case(case: Case, directory: Path) -> bool:
    """Runs `bench target` for a case; returns whether it gave a result."""
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (directory / "log.txt").open("w") as log:
        code = subprocess.run(command(case, directory), stdout=log, stderr=log, check=False).returncode
    logger.info("%s: exit code %d after %.0f s", case.name, code, time.monotonic() - start)
    return code == 0


def command(case: Case, directory: Path) -> list[str]:
    """The command line of `bench target` for a case."""
    overrides = {
        "mesh.data": case.data,
        "mesh.model": case.model,
        "train.accumulation_steps": case.accumulation_steps,
    }
    return [
        *(sys.executable, "-m", "ttt_e2e", "bench", "target", f"--target={case.target}"),
        *(f"--config={PAPER}:{case.config}", f"--output={directory}"),
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
