"""What the shipped configs set is what golden/*.json say: the fields that differ from their defaults.

A new field with a default changes nothing here. A default that changes is noticed by docs/configuration.md, which has
all of them (tests/test_docs.py).
"""

import json
from pathlib import Path

import pytest

from ttt_e2e.config import each_field, from_config_dict
from ttt_e2e.flags import load_config_file

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parent / "golden"
PAPER = ("125m-e2e-8k", "1b-swa-32k", "3b-full-128k", "3b-e2e-128k", "760m-full-8k", "3b-gdn-8k", "3b-e2e_hybrid-32k")
GOLDEN_ARGS = [*(("paper", arg) for arg in PAPER), *(("quickstart", arg) for arg in ("e2e", "window", "full"))]


def changed_fields(name: str, arg: str) -> dict:
    """{section: {field: value}} of the resolved config, where it differs from the defaults."""
    changed: dict = {}
    for section, field, value in each_field(from_config_dict(load_config_file(f"{CONFIGS / name}.py:{arg}"))):
        if value != field.default:
            changed.setdefault(section, {})[field.name] = value
    return changed


@pytest.mark.parametrize(("name", "arg"), GOLDEN_ARGS)
def test_the_config_is_the_golden_one(name, arg):
    """To accept a change on purpose: `python tests/configs/test_golden.py` writes the files anew."""
    assert changed_fields(name, arg) == json.loads((GOLDEN / f"{name}-{arg}.json").read_text())


if __name__ == "__main__":
    for golden in GOLDEN_ARGS:
        (GOLDEN / f"{'-'.join(golden)}.json").write_text(json.dumps(changed_fields(*golden), indent=2) + "\n")
