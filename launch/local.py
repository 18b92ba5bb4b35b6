"""Runs the processes of one run on this machine: for trying, for testing, and for one process per GPU.

    python launch/local.py --num_processes=2 [--devices=2] [--restarts=3] -- train --config=... --workdir=...

What follows `--` is a command line of ttt-e2e. Every process's output is prefixed with its number. When a process exits
with code 75 (preempted, a checkpoint is saved) or dies, the others are stopped and all are started again, `--restarts`
times at most. SIGTERM, SIGUSR1 and SIGINT are passed on to the processes, and end the restarts.

The exit code is that of the first process that failed (75: all may be started again), or 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from ttt_e2e import streams
from ttt_e2e.errors import EXIT_REQUEUE

NEVER_RESTARTED = (0, 2)  # exit codes: done; bad input, which another start does not change


def main() -> int:
    """Starts the processes, and restarts them until they are done or may not be restarted; returns the exit code."""
    options = parse_arguments()
    stopping: list[int] = []
    group: list[subprocess.Popen] = []

    def pass_on(number, _):
        stopping.append(number)
        for process in group:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, pass_on)
    for attempt in range(options.restarts + 1):
        group[:] = start(options)
        code = wait(group, options.grace, stopping)
        if code in NEVER_RESTARTED or stopping or attempt == options.restarts:
            return code
        print(f"local: start {attempt + 2} of at most {options.restarts + 1}", file=sys.stderr, flush=True)
    return code


def parse_arguments() -> argparse.Namespace:
    """Parses the launcher's options, and the command line of ttt-e2e after `--`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage="%(prog)s [options] -- COMMAND ...")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=0, help="virtual CPU devices of each process; 0 = what is there")
    parser.add_argument("--restarts", type=int, default=0, help="starts after the first, at most")
    parser.add_argument("--grace", type=float, default=60, help="seconds that processes get to stop in")
    parser.add_argument("command", nargs="+", help="a command of ttt-e2e with its flags")
    options = parser.parse_args()
    if options.num_processes < 1 or options.restarts < 0 or options.devices < 0:
        parser.error("--num_processes takes 1 or more, --restarts and --devices 0 or more")
    return options


def start(options: argparse.Namespace) -> list[subprocess.Popen]:
    """Starts all processes, with a free port for their coordinator."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ)
    if options.devices:
        count = f"--xla_force_host_platform_device_count={options.devices}"
        environment |= {"XLA_FLAGS": f"{environment.get('XLA_FLAGS', '')} {count}", "JAX_PLATFORMS": "cpu"}
    group = []
    for number in range(options.num_processes):
        flags = [
            f"--coordinator=127.0.0.1:{port}",
            f"--num_processes={options.num_processes}",
            f"--process_id={number}",
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "ttt_e2e", *options.command, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches them through us, once
        )
        threading.Thread(target=copy_output, args=(number, process.stdout), daemon=True).start()
        group.append(process)
    return group


def copy_output(number: int, stream) -> None:
    """Copies a process's output to stdout, line by line, each prefixed with the process's number."""
    for line in stream:
        sys.stdout.write(f"[{number}] {line.decode(errors='replace')}")
        sys.stdout.flush()


def wait(group: list[subprocess.Popen], grace: float, stopping: list[int]) -> int:
    """Waits until all processes have ended: the exit code of the first that failed, or 0.

    grace: seconds from the first failure, or from a signal, until the others are killed. stopping: signals received.
    """
    first, deadline = 0, float("inf")
    reported: set[int] = set()
    while len(reported) < len(group):
        for number, process in enumerate(group):
            code = process.poll()
            if code is None or number in reported:
                continue
            reported.add(number)
            if code:
                print(f"local: process {number} ended {describe(code)}", file=sys.stderr, flush=True)
            if code and not first:
                first, deadline = code, time.monotonic() + grace
        if stopping:
            deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for process in group:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    return first if first >= 0 else 128 - first


def describe(code: int) -> str:
    """An exit code as text: the signal that killed the process, or the number."""
    if code < 0:
        return f"by {signal.Signals(-code).name}"
    return f"with code {code}" + (" (start again)" if code == EXIT_REQUEUE else "")


if __name__ == "__main__":
    sys.exit(streams.run(main))
