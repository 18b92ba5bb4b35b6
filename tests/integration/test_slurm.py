"""A real Slurm on this machine: slurmctld, two slurmd and munge from Debian's packages, started by the test.

`launch/slurm.sbatch` runs two nodes, a signal in the middle makes the run save, the job is requeued and ends as an
undisturbed one does. Needs root, as slurmd does, and `apt-get install slurmctld slurmd slurm-client munge`; where these
are missing it is skipped, and says so.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttt_e2e.data.store import TokenWriter, write_attributes

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
NUM_STEPS = 200

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here: {', '.join(MISSING)} missing (apt-get install)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits until the credentials of its last start have expired.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdSpoolDir={directory}/spool.%n
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmdLogFile={directory}/slurmd.%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(what: str, condition, seconds: float, describe=lambda: ""):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds} s: {describe()}"
        time.sleep(0.2)
    return result


class Slurm:
    """A cluster of two nodes, and its commands."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.ports = free_ports(4)
        self.daemons = []
        self.environment = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            # Nodes that are no hosts: node1 has no address that JAX could look up.
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{self.ports[3]}",
        }

    def start(self):
        directory = self.directory
        (directory / "state").mkdir()
        (directory / "slurm.conf").write_text(
            SLURM_CONF.format(directory=directory, host=socket.gethostname(), ports=self.ports)
        )
        key = directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"key": "key", "pid": "pid", "log": "log", "seed": "seed"}
        files = [f"--{kind}-file={directory}/munge.{name}" for kind, name in names.items()]
        self._daemon("munged", "--foreground", "--force", f"--socket={directory}/munge.socket", *files)
        wait_for("munge socket", (directory / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-f", str(directory / "slurm.conf"))
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node, "-f", str(directory / "slurm.conf"))
        idle = lambda: self.run("sinfo", "--noheader", "--format=%T %D", check=False).split() == ["idle", "2"]  # noqa: E731
        wait_for("two idle nodes", idle, 60, lambda: self.run("sinfo", "--Node", "--long", check=False))

    def stop(self):
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _daemon(self, *command: str):
        with (self.directory / f"daemon{len(self.daemons)}.log").open("w") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.directory)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))


@pytest.fixture(scope="module")
def slurm():
    # Not below pytest's own directory: the path of munge's socket must be short.
    directory = Path("/tmp") / f"slurm-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    cluster = Slurm(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    writer = TokenWriter(directory / "store", "train", 50)
    writer.append(np.random.default_rng(0).integers(0, 50, 5000))
    writer.close()
    write_attributes(directory / "store", {})
    (directory / "config.py").write_text(
        f"""
from ttt_e2e.config import default_config

def get_config():
    config = default_config()
    config.model.update(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_fast_blocks=1)
    config.model.sliding_window = 8
    config.inner.mini_batch_size = 8
    config.train.update(seq_len=16, global_batch_size=8, num_steps={NUM_STEPS})
    config.data.path = {str(directory / "store")!r}
    config.log.every_steps = 1
    return config
"""
    )
    return directory / "config.py"


def submit(slurm: Slurm, config_file, workdir) -> str:
    options = ("--gpus-per-node=0", "--parsable", f"--output={workdir}.log")
    train = ("train", f"--config={config_file}", f"--workdir={workdir}")
    return slurm.run("sbatch", *options, str(ROOT / "launch" / "slurm.sbatch"), *train).strip()


def is_over(slurm: Slurm, number: str) -> bool:
    return slurm.job(number)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def losses(workdir) -> list[tuple[int, float]]:
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def test_a_signalled_job_saves_is_requeued_and_ends_as_an_undisturbed_one(slurm, config_file, tmp_path):
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    number = submit(slurm, config_file, disturbed)

    def said():
        log = Path(f"{disturbed}.log")
        return f"{slurm.job(number)}\n{log.read_text(errors='replace') if log.exists() else ''}"

    wait_for("ten steps", lambda: len(losses(disturbed)) >= 10, 600, said)
    slurm.run("scancel", "--signal=USR1", number)
    wait_for("requeue", lambda: slurm.job(number)["Restarts"] == "1", 60, said)
    saved = [int(path.name) for path in (disturbed / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(saved) == 1
    assert 10 <= saved[0] < NUM_STEPS
    wait_for("end", lambda: is_over(slurm, number), 600, said)
    job = slurm.job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), said()
    assert f"job {number} goes back into the queue" in said()

    number = submit(slurm, config_file, undisturbed)
    wait_for("end", lambda: is_over(slurm, number), 600)
    assert slurm.job(number)["Restarts"] == "0"
    assert [step for step, _ in losses(disturbed)] == list(range(1, NUM_STEPS + 1))
    assert losses(disturbed) == losses(undisturbed)


def test_a_users_mistake_is_not_requeued(slurm, config_file, tmp_path):
    number = submit(slurm, f"{config_file}.no", tmp_path / "run")
    wait_for("end", lambda: is_over(slurm, number), 120, lambda: slurm.job(number))
    job = slurm.job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert "does not exist" in (tmp_path / "run.log").read_text(errors="replace")


def test_a_sweep_through_slurm_submits_each_point_once(slurm, config_file, tmp_path):
    swept = tmp_path / "config.py"
    swept.write_text(f"{config_file.read_text()}\ndef sweep():\n    return {{'train.seed': [0, 1]}}\n")
    submission = f"sbatch --nodes=1 --gpus-per-node=0 --output={tmp_path}/%j.log {ROOT / 'launch' / 'slurm.sbatch'}"
    arguments = [f"--config={swept}", f"--output={tmp_path / 'out'}", f"--submit={submission}"]
    arguments += ["--config.train.num_steps=20", "--config.optimizer.warmup_steps=2"]

    def launch() -> list[str]:
        return slurm.run(sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments).splitlines()

    assert launch()[-1] == "2 of 2 points finished or submitted"
    records = [path.read_text() for path in sorted(tmp_path.glob("out/*/submitted.json"))]
    assert launch()[-1] == "2 of 2 points finished or submitted"
    assert [path.read_text() for path in sorted(tmp_path.glob("out/*/submitted.json"))] == records
    jobs = [json.loads(record)["job"] for record in records]
    wait_for("end", lambda: all(is_over(slurm, job) for job in jobs), 600)
    assert launch()[:2] == ["train.seed=0: finished", "train.seed=1: finished"]
