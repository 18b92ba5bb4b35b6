#!/usr/bin/env bash
# A run on all hosts of a TPU pod slice; JAX finds the other hosts by itself:
#
#     launch/tpu_pod.sh [--dry_run] NAME ZONE train --config=configs/paper.py:1b-e2e-8k --workdir=gs://BUCKET/runs/1b ...
#
# What follows NAME and ZONE is a command of ttt-e2e. Every host has this repository in ~/ttt-e2e (or $TTT_E2E_DIR), with
# an environment in .venv with the extras `tpu` and `gcs`; docs/sweeps.md says how it gets there. A run that was told to
# stop, and has saved, is started again. Secrets: put them into the hosts' own environment; what stands on a command line
# shows in their process lists.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then
  dry_run=1
  shift
fi
if [[ $# -lt 3 ]]; then
  echo "usage: launch/tpu_pod.sh [--dry_run] NAME ZONE train --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2

readonly preempted=75
printf -v arguments ' %q' "$@"
remote="cd ${TTT_E2E_DIR:-ttt-e2e} && exec .venv/bin/python -m ttt_e2e$arguments"
command=(gcloud alpha compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")

if [[ -n $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi

while true; do
  code=0
  "${command[@]}" || code=$?
  if [[ $code -ne $preempted ]]; then
    exit "$code"
  fi
  echo "saved and told to stop: starting it again" >&2
done
