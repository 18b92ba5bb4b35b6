"""Compiles every configuration of configs/paper.py for the smallest slices that it fits, and makes the tables.

    python launch/targets.py --output=runs/targets --match='h100|h200'      (with the extra targets-cuda)
    python launch/targets.py --output=runs/targets --match='v5p|v6e'        (with the extra targets-tpu)
    python launch/targets.py --output=runs/targets --tables                 (with the extra plot)

One configuration at a time, each in a process of its own, from the smallest slice up until one fits. Run again, it
leaves out what has a result. What the output directory holds:

    CONFIG@TARGET@MESH/     what `ttt-e2e bench target` wrote, and log.txt: what it printed
    tables.md, *.png        of all results there (docs/targets.md)
"""

import json
import logging
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from absl import flags

from ttt_e2e.bench import target_tables
from ttt_e2e.errors import UserError
from ttt_e2e.flags import load_config_file, parse

logger = logging.getLogger("ttt_e2e.targets")

PAPER = Path(__file__).parents[1] / "configs" / "paper.py"
SIZES, KINDS, CONTEXTS = ("125m", "350m", "760m", "1b", "3b"), ("e2e", "full", "swa"), ("8k", "32k", "128k")
H100 = tuple(f"h100:{n}" for n in (1, 8, 16, 32, 64, 128))
V5P = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4")
V6E = ("v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16")
# Sequences that a device reads at a time. One where they are long.
AT_ONCE = {("8k", "125m"): 4, ("8k", "350m"): 4, ("8k", "760m"): 2, ("8k", "1b"): 2}
REPRODUCED = ("125m-e2e-8k", "125m-full-8k")  # publicly, on 8 H200s


class Case(NamedTuple):
    """A configuration, compiled for a slice."""

    config: str  # argument of configs/paper.py
    target: str
    data: int
    model: int
    accumulation_steps: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.config}@{self.target.replace(':', '-')}@{self.data}x{self.model}"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when all that was asked has a result, 1 otherwise, 2 after bad input."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("ttt_e2e").setLevel(logging.INFO)
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    values, _ = parse(argv, _define, "launch/targets.py: compile the paper's configurations for absent accelerators.")
    if not values.output:
        raise UserError("--output is missing: a directory for the results")
    output = Path(values.output)
    if values.tables:
        print(target_tables.write(output))
        return 0
    missing = [search for ladder in ladders() if (search := climb(ladder, output, values.match))]
    for name in missing:
        logger.info("%s: no result; its log.txt says why", name)
    return bool(missing)


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("output", "", "Directory for the results.", flag_values=values)
    flags.DEFINE_string("match", "", "Only cases whose CONFIG@TARGET@MESH this matches somewhere.", flag_values=values)
    flags.DEFINE_boolean("tables", False, "Make the tables of what is there, and compile nothing.", flag_values=values)


def ladders() -> list[list[Case]]:
    """For every configuration and accelerator the cases to try, from the smallest slice up."""
    names = [f"{size}-{kind}-{context}" for size in SIZES for context in CONTEXTS for kind in KINDS]
    rungs = [(name, H100) for name in names]
    rungs += [(name, ("h200:8",)) for name in REPRODUCED]
    rungs += [(name, slices) for slices in (V5P, V6E) for name in names if name.startswith("3b")]
    return [[case for target in targets if (case := make_case(name, target))] for name, targets in rungs]


def make_case(name: str, target: str) -> Case | None:
    """The recipe's batch on a slice: sequences over all devices, and where there are more devices, `model` takes them.

    None where there are more devices than a host has for each sequence.
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
    """Sequences a step of a configuration."""
    return load_config_file(f"{PAPER}:{name}").train.global_batch_size


def climb(ladder: list[Case], output: Path, match: str = "") -> str:
    """Compiles the cases of a ladder until one fits. Returns the name of one that gave no result, or ""."""
    for case in ladder:
        if not re.search(match, case.name):
            continue
        directory = output / case.name
        if not (directory / "results.json").exists() and not compile_case(case, directory):
            return case.name
        if json.loads((directory / "results.json").read_text())[0]["fits"]:
            return ""
    return ""


def compile_case(case: Case, directory: Path) -> bool:
    """Runs `bench target` for a case; whether it gave a result."""
    directory.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (directory / "log.txt").open("w") as log:
        code = subprocess.run(command(case, directory), stdout=log, stderr=log, check=False).returncode
    logger.info("%s: exit code %d after %.0f s", case.name, code, time.monotonic() - start)
    return code == 0


def command(case: Case, directory: Path) -> list[str]:
    """What compiles a case."""
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
