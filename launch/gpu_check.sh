#!/usr/bin/env bash
# What a GPU that nobody has run this on should be asked first, into one file, gpu_check.md, with the hardware named:
#
#     launch/gpu_check.sh [--rehearse] [--parts=code,check,attention,meta_gradient,end_to_end] [--limit=SECONDS] [OUTPUT]
#
#   code           registers and spills of the Hopper kernels; their compiler must be here (not in a rehearsal)
#   check          every pass of every attention kernel, its error against float64
#   attention      time and FLOP/s of every pass: the Hopper kernels, XLA's, cuDNN's
#   meta_gradient  time of a loss and meta-gradient in terms of that of the plain step, 125M and 760M at 8K
#   end_to_end     the same of the 760M model with the Hopper kernels in its suffix, and with XLA's
#
# Every step of a part has --limit seconds (default 540); one that fails or runs out of time is noted, the others go on,
# and the exit status is 1. Parts may be run one at a time into the same OUTPUT (default gpu_check). --rehearse is for
# machines without a GPU: toy sizes, kernels interpreted. Makes the environment (.venv) where there is none; or else
# $PYTHON names the interpreter of one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

parts=code,check,attention,meta_gradient,end_to_end
limit=540
output=gpu_check
rehearse=
for argument in "$@"; do
  case $argument in
    --rehearse) rehearse=1 ;;
    --parts=*) parts=${argument#*=} ;;
    --limit=*) limit=${argument#*=} ;;
    -*)
      echo "usage: $0 [--rehearse] [--parts=code,check,attention,meta_gradient,end_to_end] [--limit=SECONDS] [OUTPUT]" >&2
      exit 2
      ;;
    *) output=$argument ;;
  esac
done
for part in ${parts//,/ }; do
  case $part in
    code | check | attention | meta_gradient | end_to_end) ;;
    *)
      echo "--parts=$part: legal are code, check, attention, meta_gradient, end_to_end" >&2
      exit 2
      ;;
  esac
done

python=${PYTHON:-.venv/bin/python}
if [[ ! -x $(command -v "$python") ]]; then
  make install && .venv/bin/python -m pip install --quiet -c constraints.txt -e '.[cuda]' || exit 2
  python=.venv/bin/python
fi
platform=cuda
[[ -n $rehearse ]] && platform=cpu
export JAX_PLATFORMS=$platform
mkdir -p "$output"
failed=()

# Runs one benchmark into a directory of its own: NAME, then the benchmark and its flags.
measure() {
  local name=$1
  shift
  echo "== $name: bench $*" >&2
  if ! timeout --kill-after=10 "$limit" "$python" -m ttt_e2e bench "$@" --output="$output/$name" >"$output/$name.log" 2>&1; then
    failed+=("$name")
    echo "   failed: $output/$name.log" >&2
  fi
}

code() {
  [[ -n $rehearse ]] || measure code kernel_code
}

check() {
  if [[ -n $rehearse ]]; then
    measure check attention_check --head_dims=16 --dtypes=bfloat16 --seq_len=40 --cached=60 --window=50 --batch=1
  else
    measure check attention_check
  fi
}

attention() {
  if [[ -n $rehearse ]]; then
    measure attention_toy window_attention --seq_lens=64 --cached_lens=64 --windows=64 --head_dims=16 --num_heads=1 \
      --dtypes=bfloat16 --variants=xla,mosaic_gpu --repeats=1
    return
  fi
  local heads batch
  for heads in 12x64 32x80; do
    for batch in 1 8; do
      # A mini-batch of 1024 and its window cache; and the whole sequence, which is what cuDNN can do.
      measure "attention_${heads}_$batch" window_attention --seq_lens=1024,8192 --cached_lens=0,8192 --windows=8192 \
        --num_heads="${heads%x*}" --head_dims="${heads#*x}" --batch="$batch" --dtypes=bfloat16 \
        --variants=cudnn,mosaic_gpu,xla
    done
  done
}

meta_gradient() {
  local variants=plain,reference,exact/store/mini_batch,exact/store/block,exact/store/keep,exact/auto/auto,first_order
  if [[ -n $rehearse ]]; then
    measure meta_gradient_toy meta_gradient --width=32 --mlp_width=32 --vocab=64 --mini_batch=16 --window=32 \
      --seq_len=64 --variants=plain,exact/auto/auto --repeats=1
    return
  fi
  local model
  for model in 125m 760m; do
    measure "meta_gradient_$model" meta_gradient --config="configs/paper.py:$model-e2e-8k" \
      --config.model.compute_dtype=bfloat16 --config.mesh.data=1 --batch=1 --variants="$variants"
    # The step of full attention that it is compared with; its attention goes through cuDNN.
    measure "meta_gradient_${model}_full" meta_gradient --config="configs/paper.py:$model-e2e-8k" \
      --config.model.compute_dtype=bfloat16 --config.model.sliding_window=0 --config.inner.mini_batch_size=8192 \
      --config.mesh.data=1 --batch=1 --variants=plain
  done
}

end_to_end() {
  local attention
  for attention in mosaic_gpu xla; do
    if [[ -n $rehearse ]]; then # the kernels are no part of a larger program where they are interpreted
      attention=xla
      measure "end_to_end_$attention" meta_gradient --attention="$attention" --width=32 --mlp_width=32 --vocab=64 \
        --mini_batch=16 --window=32 --seq_len=64 --variants=exact/auto/auto --dtype=bfloat16 --repeats=1
      return
    fi
    measure "end_to_end_$attention" meta_gradient --attention="$attention" --config=configs/paper.py:760m-e2e-8k \
      --config.model.compute_dtype=bfloat16 --config.mesh.data=1 --batch=1 --variants=plain,exact/auto/auto
  done
}

for part in ${parts//,/ }; do
  "$part"
done

{
  echo "# Attention kernels on a GPU"
  echo
  [[ -n $rehearse ]] && echo "A rehearsal: toy sizes on a CPU, kernels interpreted. No figure here means anything." && echo
  echo '```'
  date -u +'%Y-%m-%d %H:%M UTC'
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv 2>/dev/null \
    || echo "no nvidia-smi"
  "$python" -c 'import jax; print("jax", jax.__version__, [d.device_kind for d in jax.devices()])' 2>&1 | tail -n 1
  echo '```'
  shown=
  for results in "$output"/code/results.md "$output"/*/results.md; do
    [[ -e $results && $results != "$shown" ]] || continue
    shown=${shown:-$results}
    echo
    echo "## $(basename "$(dirname "$results")")"
    echo
    grep -v '^# ' "$results"
  done
  for name in ${failed[@]+"${failed[@]}"}; do
    echo
    echo "## Failed: $name"
    echo
    tail -n 15 "$output/$name.log" | sed 's/^/    /'
  done
} >"$output/gpu_check.md"
echo "$output/gpu_check.md" >&2
[[ ${#failed[@]} -eq 0 ]]
