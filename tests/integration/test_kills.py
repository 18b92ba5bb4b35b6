"""Killed at any moment, a run goes on from its last complete save, and ends as if nothing had been."""

import os
import random
import re
import signal
import threading
import time

import pytest

from tests.integration.conftest import BOUND, digests, evaluations, losses, process, steps


def run_with_kills(runs, workdir, kills: int, *overrides) -> tuple[int, str]:
    """Runs to the end while processes are killed at seeded moments, about one second to ten after they started.

    Returns how many kills there were, and the output.
    """
    moments = random.Random(kills)
    launcher = runs.begin(workdir, *overrides, launcher=(f"--restarts={kills + 5}",))
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(launcher.stdout))
    reader.start()
    seen, done = set(), 0
    deadline = time.monotonic() + BOUND * (1 + kills / 5)
    due = None
    while launcher.poll() is None:
        assert time.monotonic() < deadline, "".join(lines)
        if (workdir / "checkpoints").exists():
            # The newest: an old one may be seen while it is deleted, file by file.
            for step in steps(workdir)[-1:]:
                assert (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").exists()
                seen.add(step)
        try:
            victim = process(launcher, moments.choice((0, 1)) if due else 0)
        except (LookupError, FileNotFoundError):
            time.sleep(0.02)
            continue
        if done < kills and due is None:
            # In the start-up, or when it trains: then, some way into the steps that are left.
            due = (time.monotonic() + moments.uniform(0.5, 4), None)
            if moments.random() < 0.75:
                due = (None, max(seen, default=0) + moments.randint(1, 3))
                extra = moments.uniform(0, 0.2)
        elif done < kills:
            at, step = due
            if step and _reached(workdir, step):
                due = (time.monotonic() + extra, None)
            elif at and time.monotonic() > at:
                os.kill(victim, signal.SIGKILL)
                done, due = done + 1, None
                time.sleep(1)
        time.sleep(0.01)
    reader.join()
    output = "".join(lines)
    assert launcher.returncode == 0, output
    for resumed in map(int, re.findall(r"\[0\] resuming from step (\d+) ", output)):
        assert resumed in seen
    return done, output


def _reached(workdir, step: int) -> bool:
    metrics = workdir / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


# Enough steps to be killed in, some of which each start goes on for before it is.
@pytest.mark.parametrize("kills, num_steps", ((5, 36), pytest.param(50, 250, marks=pytest.mark.slow)))
def test_kills_change_nothing(kills, num_steps, runs):
    undisturbed, killed = (runs.root / f"{name}-by-{kills}-kills" for name in ("undisturbed", "killed"))
    overrides = (f"--config.train.num_steps={num_steps}",)
    outcome = runs.launch(undisturbed, *overrides)
    assert outcome.returncode == 0, outcome.stdout
    done, output = run_with_kills(runs, killed, kills, *overrides)
    assert done == kills, output
    assert losses(killed) == losses(undisturbed), output
    assert evaluations(killed) == evaluations(undisturbed)
    assert digests(killed, num_steps) == digests(undisturbed, num_steps)
