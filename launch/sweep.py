"""Runs every point of a sweep, here or through a scheduler. Started again, it runs the points missing or failed.

    python launch/sweep.py --config=configs/quickstart.py --output=runs/sweep --parallel=2
    python launch/sweep.py --config=configs/quickstart.py --output=runs/sweep --submit='sbatch launch/slurm.sbatch'

docs/sweeps.md has the rest. What the sweep directory holds:

    sweep.json          the points: name and overrides
    NAME/               the run directory of a point; its `config.json` is written before the run starts
    NAME/sweep.lock     locked (flock) while the point runs here, by this launcher and by the run that it started
    NAME/submitted.json the scheduler's job for the point
    NAME/logs/sweep.log output of the runs that were started here
"""

import hashlib
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from ttt_e2e import streams
from ttt_e2e.checkpoints.steps import saved_steps
from ttt_e2e.cluster.signals import GRACE_SECONDS, STOP_SIGNALS
from ttt_e2e.errors import EXIT_REQUEUE, JSON_ERRORS, UserError
from ttt_e2e.flags import parse, path
from ttt_e2e.outputs import check_directory, is_of_the_disk, writing
from ttt_e2e.progress import progress_bar
from ttt_e2e.runs.directory import write_config
from ttt_e2e.runs.files import read_json, replace_text
from ttt_e2e.runs.lock import is_alive, try_flock
from ttt_e2e.runs.secrets import redact
from ttt_e2e.strict_json import to_json
from ttt_e2e.sweep import Point, check_unchanged, make_points, seems_whole

logger = logging.getLogger("ttt_e2e.sweep")

SLURM_JOBS = "squeue --me --noheader --format=%A"
# What schedulers answer to a submission: the job's id, and of Slurm its cluster, if there are several.
SLURM_ANSWERS = (r"Submitted batch job (\d+)(?: on cluster (\S+))?", r"^(\d+)(?:;(\S+))?$")  # the latter: --parsable
OTHER_ANSWERS = (
    r"^[\w.-]+/(\S+)(?: (?:created|configured|unchanged|serverside-applied))?$",  # kubectl, also with -o name
    r"^Your job(?:-array)? (\d+)",  # qsub of Grid Engine
    r"^Job <(\d+)> is submitted",  # bsub
)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 when every point is finished or submitted, 1 otherwise, 2 after bad input."""
    return streams.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    """Logs to stderr, and prints an error that the user can mend as one line; returns the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("ttt_e2e").setLevel(logging.INFO)
    try:
        return _main(argv)
    except UserError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        print(f"error: {error.filename or 'output'} cannot be written: {error.strerror}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    """Runs or submits the sweep that the flags describe; returns the exit code. Raises `UserError` for bad input."""
    values, overrides = parse(argv, _define, "launch/sweep.py: run every point of a sweep.")
    for name in ("config", "output"):
        if not values[name].value:
            raise UserError(f"--{name} is missing: {values[name].help}")
    if "://" in values.output:
        raise UserError(f"--output is {values.output!r}, but it must be a directory of this machine: it holds locks")
    output = Path(values.output)
    points = make_points(values.config, overrides, values.sweeps, output)
    for point in points:
        check_unchanged(point)
    if values.dry_run:
        return _dry_run(points, values)
    check_directory("output", output)
    _write(values.config, overrides, points, output)
    active = _active_jobs(points, values)
    missing = [point for point in points if state_of(point, active) not in ("finished", "submitted")]
    if values.submit:
        outcomes = {point.name: submit(point, values.submit) for point in missing}
        return _summary(points, outcomes, active, done=("finished", "submitted"))
    outcomes, stopped_by = run_here(missing, values.launcher, values.parallel)
    code = _summary(points, outcomes, active, done=("finished",))
    return {None: code, signal.SIGINT: 130}.get(stopped_by, EXIT_REQUEUE)


def _define(values: flags.FlagValues) -> None:
    def string(name: str, default: str, text: str) -> None:
        flags.DEFINE_string(name, default, text, flag_values=values)

    text = "Config file with a sweep(), FILE.py[:ARG]; --config.section.field=value holds for all points."
    path(values, "config", text)
    path(values, "output", "Directory of the sweep, with one run directory a point.")
    flags.DEFINE_list("sweeps", [], "Which of the named sweeps to multiply, A,B,...; default: all.", flag_values=values)
    flags.DEFINE_integer("parallel", 1, "Runs at a time on this machine.", lower_bound=1, flag_values=values)
    launcher = f"{shlex.quote(sys.executable)} -m ttt_e2e"
    string("launcher", launcher, "What runs a command of ttt-e2e here; {slot} counts from 0 to --parallel - 1.")
    string("submit", "", "Instead: shell command that submits one; {args}, {name} and {workdir} stand for its own.")
    string("active", "", "Shell command that lists the ids of jobs not yet over; for sbatch it is known.")
    flags.DEFINE_boolean("dry_run", False, "Print everything and write nothing.", flag_values=values)


def _write(spec: str, overrides: list[str], points: list[Point], output: Path) -> None:
    """Writes `sweep.json`, which keeps the points of earlier sweeps, and the `config.json` of each new point."""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    path, names = output / "sweep.json", {point.name for point in points}
    before = read_json(path).get("points", []) if path.exists() else []
    entries = [entry for entry in before if entry["name"] not in names]
    entries += [{"name": point.name, "overrides": point.overrides} for point in points]
    manifest = {"config": spec, "overrides": [redact(override) for override in overrides], "points": entries}
    replace_text(path, to_json(manifest, indent=2) + "\n")
    for point in points:
        if not (point.workdir / "config.json").exists():
            write_config(point.workdir, point.config)


# --------------------------------------------------------------------------------------------------------------- states


def state_of(point: Point, active: set[str] | None) -> str:
    """The state of a point: `finished`, `submitted`, `running` (here), `unfinished` (it has a checkpoint) or `missing`.

    active: ids of the scheduler's jobs that are not yet over; None = not known, and then every submitted job counts as
      one of them.
    """
    step = last_step(point.workdir)
    if _is_finished(point):
        return "finished"
    if submission := _submitted(point):
        job = submission.get("job")
        if not job or active is None or job in active:
            return "submitted"
    if _is_locked(point):
        return "running"
    return "missing" if step is None else "unfinished"


def last_step(workdir: Path) -> int | None:
    """Step of a run's newest checkpoint, or None."""
    return max(saved_steps(workdir / "checkpoints"), default=None)


def _is_finished(point: Point) -> bool:
    """Whether the checkpoint of the last step is whole, as far as can be told without reading its arrays."""
    step = last_step(point.workdir)
    return step is not None and step >= point.config.train.num_steps and seems_whole(point.workdir, step)


def _active_jobs(points: list[Point], values: flags.FlagValues) -> set[str] | None:
    """Ids of the scheduler's jobs that are not yet over; None if no command lists them, or no point is submitted.

    Raises:
      UserError: the command failed.
    """
    if not any((point.workdir / "submitted.json").exists() for point in points):
        return None
    if not values.active and not _is_slurm(values.submit):
        return None
    clusters = {_submitted(point).get("cluster", "") for point in points}
    of_slurm = {f"{SLURM_JOBS} --clusters={shlex.quote(name)}" if name else SLURM_JOBS for name in clusters}
    jobs: set[str] = set()
    for command in [values.active] if values.active else of_slurm:
        result = subprocess.run(command, shell=True, capture_output=True, text=True)
        if result.returncode:  # does not mean that no job is active: jobs would be submitted twice
            failure = f"{command!r} failed with exit code {result.returncode}: {_last_line(result.stderr)}"
            raise UserError(f"--active: {failure}")
        jobs |= set(result.stdout.split())
    return jobs


def _submitted(point: Point) -> dict:
    """The record of a point's submission, `submitted.json`: {"job", "cluster", "time"}; {} if it was not submitted."""
    path = point.workdir / "submitted.json"
    return read_json(path) if path.exists() else {}


def acquire(point: Point):
    """Locks a run directory: returns the locked open file, or None if another process holds the lock.

    The kernel keeps the lock as long as any process has the file open, so that it ends with the last of them, even if
    that is killed. Machines may share a file system but not its locks, and some file systems have none: for these, the
    file names the holder and its host. (Two that come at the same moment may then both get it, or one whose launcher
    was killed while its run goes on: the second run is refused by the lock of the first, runs/lock.py.)
    """
    with writing(point.workdir):
        point.workdir.mkdir(parents=True, exist_ok=True)
        file = (point.workdir / "sweep.lock").open("a+")
    locked = try_flock(file)
    if locked is False or _is_of_another(_holder(point), bool(locked)):
        file.close()
        return None
    with writing(point.workdir):
        _fill(file, to_json({"pid": os.getpid(), "host": socket.gethostname()}))
    return file


def release(lock) -> None:
    """Empties and unlocks the file of a lock. (If it were removed, two processes could lock two different files.)"""
    _fill(lock, "")
    lock.close()


def _fill(file, text: str) -> None:
    """Replaces the contents of an open file."""
    file.truncate(0)
    file.write(text)
    file.flush()


def _holder(point: Point) -> dict:
    """{"pid", "host"} of the launcher that locked a point; {} if none is recorded."""
    try:
        holder = json.loads((point.workdir / "sweep.lock").read_bytes())
    except (FileNotFoundError, *JSON_ERRORS):  # not locked, or cut short by a kill
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}


def _is_of_another(holder: dict, has_locks: bool) -> bool:
    """Whether the launcher that a file names may live. Of this machine, the kernel knows it where there are locks."""
    if not holder or holder.get("host", socket.gethostname()) != socket.gethostname():
        return bool(holder)
    return not has_locks and holder["pid"] != os.getpid() and is_alive(holder["pid"])


def _is_locked(point: Point) -> bool:
    """Whether another process holds a point's lock: `acquire` would return None. Changes nothing."""
    if not (point.workdir / "sweep.lock").exists():
        return False
    with (point.workdir / "sweep.lock").open() as file:
        locked = try_flock(file, shared=True)
    return locked is False or _is_of_another(_holder(point), bool(locked))


# ----------------------------------------------------------------------------------------------------------- runs, here


@dataclass
class _Child:
    """A run that was started here."""

    point: Point
    process: subprocess.Popen
    lock: object  # as of `acquire`
    slot: int
    first_step: int | None  # newest checkpoint when it was started


def run_here(points: list[Point], launcher: str, parallel: int) -> tuple[dict[str, str], signal.Signals | None]:
    """Runs points on this machine, `parallel` at a time.

    It waits for points that another process runs. The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP makes the runs save and
    end, the second makes them end at once, the third kills them; signals within `GRACE_SECONDS` of one are no other.

    Returns:
      ({name of a point: its outcome}, the first signal received, or None).
    """
    waiting, children, outcomes, signals, times = list(points), [], {}, [], []

    def receive(number: int, _) -> None:
        if not times or time.monotonic() - times[-1] > GRACE_SECONDS:
            signals.append(number)
            times.append(time.monotonic())

    before = {number: signal.signal(number, receive) for number in _STOPPING}
    num_handled = 0  # signals
    bar = progress_bar(total=len(points), desc="sweep", unit="run", disable=not points)
    try:
        while children or (waiting and not signals):
            if not signals:
                _start_some(waiting, children, outcomes, launcher, parallel)
            for number in range(num_handled, len(signals)):
                _stop(children, number)
            num_handled = len(signals)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                outcome = _finish(child, is_stopping=bool(signals))
                if outcome == "preempted" and not signals:
                    waiting.append(child.point)
                else:
                    outcomes[child.point.name] = outcome
            if len(outcomes) > bar.n:
                bar.update(len(outcomes) - bar.n)
            time.sleep(0.1)
    finally:
        bar.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcomes, signal.Signals(signals[0]) if signals else None


_STOPPING = (*STOP_SIGNALS, signal.SIGHUP)


def _start_some(waiting: list[Point], children: list[_Child], outcomes: dict, launcher: str, parallel: int) -> None:
    """Starts waiting points until `parallel` run; those that another process has locked stay waiting."""
    for point in list(waiting):
        if len(children) == parallel:
            return
        if state_of(point, set()) == "finished":  # by another process
            waiting.remove(point)
            outcomes[point.name] = "finished"
            continue
        try:
            lock = acquire(point)
        except UserError as error:
            waiting.remove(point)
            outcomes[point.name] = f"failed: {error}"
            continue
        if lock:
            waiting.remove(point)
            slot = min(set(range(parallel)) - {child.slot for child in children})
            try:
                children.append(_start(point, lock, launcher, slot))
            except OSError as error:
                release(lock)
                outcomes[point.name] = f"failed: the launcher {launcher!r} cannot be run: {error.strerror}"
            except UserError as error:
                release(lock)
                outcomes[point.name] = f"failed: {error}"
        elif _holder(point).get("host", socket.gethostname()) != socket.gethostname():
            waiting.remove(point)
            outcomes[point.name] = f"running on {_holder(point)['host']}; if not, remove {point.workdir}/sweep.lock"


def _start(point: Point, lock, launcher: str, slot: int) -> _Child:
    """Starts the run of a point, which inherits the lock. Raises `OSError` if the launcher cannot be run."""
    command = [*shlex.split(launcher.replace("{slot}", str(slot))), *_arguments(point)]
    write_config(point.workdir, point.config)
    with writing(point.workdir):
        (point.workdir / "logs").mkdir(exist_ok=True)
    with (point.workdir / "logs" / "sweep.log").open("ab") as log:
        # In a session of its own, the run gets no Ctrl-C from the terminal, but one signal from this launcher.
        output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, **output, start_new_session=True, pass_fds=[lock.fileno()])
    logger.info("%s: started, process %d", point.name, process.pid)
    return _Child(point, process, lock, slot, last_step(point.workdir))


def _stop(children: list[_Child], number_before: int) -> None:
    """Signals the runs: the first time to save and end, the second time to end at once; the third time it kills them.

    number_before: signals handled before this one.
    """
    for child in children:
        if child.process.poll() is not None:
            continue
        if number_before < 2:
            logger.info("%s: told to %s", child.point.name, "end at once" if number_before else "save and end")
            child.process.terminate()
        else:
            os.killpg(child.process.pid, signal.SIGKILL)


def _finish(child: _Child, is_stopping: bool) -> str:
    """Releases the lock of a run that has ended, and returns its outcome: finished, preempted, or failed and why.

    is_stopping: whether the runs were told to end.
    """
    point, code = child.point, child.process.returncode
    step = last_step(point.workdir)
    release(child.lock)
    if _is_finished(point):
        return "finished"
    if code == EXIT_REQUEUE and (is_stopping or step != child.first_step):  # else it would be restarted for ever
        return "preempted"
    log = point.workdir / "logs" / "sweep.log"
    return f"failed with exit code {code}: {_last_line(log.read_text(errors='replace'))} (all of it: {log})"


# ------------------------------------------------------------------------------------------------- runs, by a scheduler


def submit(point: Point, template: str) -> str:
    """Submits a point to the scheduler; returns the outcome. `submitted.json` comes first: a kill loses no job."""
    lock = acquire(point)
    if not lock:
        return "running"
    record = point.workdir / "submitted.json"
    try:
        write_config(point.workdir, point.config)
        replace_text(record, to_json({"job": "", "time": time.time()}) + "\n")
        result = subprocess.run(_submission(point, template), shell=True, capture_output=True, text=True)
        job, cluster = _job(result.stdout, template)
        if result.returncode or not (job or _is_slurm(template)):
            record.unlink()
            return f"failed to submit with exit code {result.returncode}: {_last_line(result.stderr)}"
        if not job:  # it may be in the queue: `sbatch --quiet` says nothing
            said = _last_line(result.stdout)
            return f"failed: sbatch answered without a job's number ({said}); if no job came of it, remove {record}"
        replace_text(record, to_json({"job": job, "cluster": cluster, "time": time.time()}) + "\n")
        logger.info("%s: submitted, job %s", point.name, job)
        return "submitted"
    finally:
        release(lock)


def _job(answer: str, template: str) -> tuple[str, str]:
    """Id and cluster of the job in what `--submit` printed, "" for what it does not say.

    `sbatch` may say more before and after. Of other commands the last line counts: an answer that is known, or else its
    last word.
    """
    lines = answer.strip().splitlines() or [""]
    for pattern in SLURM_ANSWERS:
        for line in lines if _is_slurm(template) else lines[-1:]:
            if found := re.search(pattern, line.strip()):
                return found[1], found[2] or ""
    if _is_slurm(template):
        return "", ""
    known = filter(None, (re.search(pattern, lines[-1]) for pattern in OTHER_ANSWERS))
    return next((found[1] for found in known), (lines[-1].split() or [""])[-1]), ""


def _is_slurm(template: str) -> bool:
    """Whether a shell command submits by `sbatch`."""
    return re.search(r"\bsbatch\b", template) is not None


def _submission(point: Point, template: str) -> str:
    """The shell command that submits a point, from `--submit`."""
    arguments = shlex.join(_arguments(point))
    label = re.sub(r"[^a-z0-9]+", "-", f"{point.workdir.parent.name}-{point.name}".lower()).strip("-")
    label = f"ttt-{label[:30].strip('-')}-{hashlib.sha256(point.name.encode()).hexdigest()[:6]}"  # legal in Kubernetes
    command = template if "{args}" in template else f"{template} {arguments}"
    for placeholder, value in (("args", arguments), ("name", label), ("workdir", str(point.workdir))):
        command = command.replace(f"{{{placeholder}}}", shlex.quote(value))
    return command


def _arguments(point: Point) -> list[str]:
    """Arguments of ttt-e2e: only the run directory, since its config.json has the rest and needs no quoting."""
    return ["train", f"--workdir={point.workdir}"]


# ------------------------------------------------------------------------------------------------------ what is printed


def _dry_run(points: list[Point], values: flags.FlagValues) -> int:
    """Prints the state, the overrides and the command of every point; returns the exit code."""
    active = _active_jobs(points, values)
    print(f"sweep: {len(points)} points in {values.output}, nothing is written")
    for point in points:
        state = state_of(point, active)
        print(f"\n{point.name}\n  state      {state}")
        for field, value in point.overrides.items():
            print(f"  override   {field} = {value!r}")
        if state not in ("finished", "submitted"):
            here = shlex.join([*shlex.split(values.launcher), *_arguments(point)])
            print(f"  command    {redact(_submission(point, values.submit) if values.submit else here)}")
    return 0


def _summary(points: list[Point], outcomes: dict[str, str], active: set[str] | None, done: tuple[str, ...]) -> int:
    """Prints the outcome or state of every point; returns 0 if all are `done`, else 1."""
    states = {point.name: outcomes.get(point.name) or state_of(point, active) for point in points}
    for point in points:
        doubt = states[point.name] == "submitted" and point.name not in outcomes and active is None
        remove = f"; if its job is over, remove {point.workdir}/submitted.json" if doubt else ""
        print(f"{point.name}: {redact(states[point.name])}{remove}")
    num_done = sum(outcome in done for outcome in states.values())
    print(f"{num_done} of {len(points)} points {' or '.join(done)}")
    return 0 if num_done == len(points) else 1


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
