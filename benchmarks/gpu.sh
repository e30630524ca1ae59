#!/usr/bin/env bash
# build, gpu tests, compute-sanitizer and gpu benchmarks in under ten minutes, on a machine with a GPU
#
#   OUT=folder      where the JSON goes (default benchmarks/results)
#   PYTHON=python3  an interpreter whose torch sees the GPU
#   BUDGET=570      seconds for everything; a step that no time is left for is recorded as such
#   STEPS="gram .." these alone, after build and environment (names as in summary-gpu.json)
#   PYTEST_ARGS=    more for pytest: tests/ops, say
#
# each step has a limit of its own, and one that fails does not stop the others: summary-gpu.json
# says what happened. Exit code 0 all passed, 1 something failed, 2 nothing could be run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
budget=${BUDGET:-570}
today=$(date +%F)
# -P: the repository root must not be on sys.path, its kernels/ would hide the PyPI package
if ! "$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: $python has no torch that sees a CUDA device; set PYTHON to one that has" >&2
  exit 2
fi
missing=()
for package in pytest pybind11 greenlet rich transformers; do
  "$python" -P -c "import $package" 2>/dev/null || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "error: $python lacks ${missing[*]}: install them, or put them, unpacked, on PYTHONPATH" >&2
  exit 2
fi
if ! mkdir -p "$out"; then
  echo "error: OUT=$out cannot be made" >&2
  exit 2
fi

# a folder of its own for what is built and made: the machine stays as it was
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT  # until there is a summary to write
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
# -P for the processes that a python starts, pytest's workers among them
export PYTHONSAFEPATH=1
export TRITON_CACHE_DIR="$work/triton" HF_HUB_OFFLINE=1
liar=("$python" -P "$work/site/bin/liar")
log=$out/gpu.log
: >"$log"
records=()
failed=0

known=(pytest gram gram-other solve cosine methods serve depth prune-7b prune-70b-2-layers memcheck tune
  serve-compile racecheck)
STEPS=$(tr ',\n\t' '   ' <<<"${STEPS:-}" | xargs)
for name in $STEPS; do
  if [[ " ${known[*]} " != *" $name "* ]]; then
    echo "error: STEPS=$name: no such step; choose from ${known[*]}" >&2
    exit 2
  fi
done
asked=$STEPS

wanted() { # NAME
  [[ -z ${STEPS:-} || " build build-python environment $STEPS " == *" $1 "* ]]
}

record() { # NAME RC SECONDS REASON; RC is null for what was not run
  records+=("$(printf '{"step": "%s", "rc": %s, "seconds": %s, "reason": "%s"}' "$@")")
  printf -- '-- %s: rc %s, %s s %s\n' "$@" | tee -a "$log"
}

skip() { # NAME REASON
  record "$1" null 0 "$2"
}

step() { # NAME LIMIT COMMAND...; fails as well if the output lacks what EXPECT holds
  # COUNTS=0: a failure is recorded, and the script does not fail for it
  local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS counts=${COUNTS:-1} rc reason=""
  shift 2
  wanted "$name" || return 0
  if ((left < 3)); then
    failed=$((failed | counts))
    skip "$name" "no time left of $budget s"
    return 1
  fi
  ((left < limit)) && limit=$left
  echo "== $name, at most $limit s: $*" | tee -a "$log"
  # to a file, not a pipe: a stray child that holds the pipe would hang the script
  timeout --kill-after=5 "$limit" "$@" >"$work/step.txt" 2>&1
  rc=$?
  tail -c 1000000 "$work/step.txt" >>"$log"
  tail -n 30 "$work/step.txt" | cut -c1-200
  ((rc == 124 || rc == 137)) && reason="limit of $limit s"
  if ((rc == 0)) && [[ -n ${EXPECT:-} ]] && ! grep -q -- "$EXPECT" "$work/step.txt"; then
    rc=1 reason="no '$EXPECT' in the output"
  fi
  if ((rc != 0)); then
    failed=$((failed | counts))
    ((counts)) || reason="${reason:+$reason; }recorded, and no failure of the script"
  fi
  record "$name" "$rc" "$((SECONDS - start))" "$reason"
  return "$rc"
}

install() { # MODE
  env LIAR_EXT_BUILD="$1" "$python" -P -m pip install --quiet --no-deps --no-build-isolation \
    --upgrade --target "$work/site" .
}
export -f install
export python work

summary() {
  local environment=null tuned=null
  [[ -s $work/environment.json ]] && environment=$(<"$work/environment.json")
  [[ -s $work/tuned.json ]] && tuned=$(<"$work/tuned.json")
  {
    printf '{"benchmark": "gpu.sh", "date": "%s", "seconds": %s, "asked": "%s", "environment": %s,\n' \
      "$today" "$SECONDS" "${asked:-everything}" "$environment"
    printf ' "steps": [\n  '
    local separator="" item
    for item in "${records[@]}"; do
      printf '%s%s' "$separator" "$item"
      separator=$',\n  '
    done
    printf '\n],\n "tuned": %s}\n' "$tuned"
  } >"$out/summary-gpu.json"
}

# written even if the script is ended from outside
trap 'summary; rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

# most important first: what is cut off by the budget is what can wait
if ! step build 150 bash -c 'install cuda'; then
  # the Triton kernels need no compiler: they can still be tested and timed
  step build-python 60 bash -c 'install python'
fi
if step environment 90 "${liar[@]}" env --json; then
  # the last line of its output; warnings may come after it
  grep '^{' "$work/step.txt" | tail -n 1 >"$work/environment.json"
fi
parallel=()
# compiling the kernels keeps a core busy and the GPU idle; one file has most of them, so that the
# workers take from each other. Without xdist, or one that is too old for this: one after another
"$python" -P -c 'from xdist.scheduler import WorkStealingScheduling' 2>/dev/null &&
  parallel=(-n auto --maxprocesses 16 --dist worksteal)
# tests that were all skipped prove nothing; a file that cannot be imported costs its own tests
EXPECT=' passed' step pytest 170 "$python" -P -m pytest -m gpu -q -p no:cacheprovider \
  --continue-on-collection-errors --durations=10 "${parallel[@]}" ${PYTEST_ARGS:-}
# a result is written when all of it is measured: two steps, so that the second cannot cost the first
step gram 120 "${liar[@]}" bench gram --device cuda --dtypes bfloat16 \
  --json "$out/gram-gpu-$today.json"
step gram-other 60 "${liar[@]}" bench gram --device cuda --dtypes float16:11008 float32:11008 \
  --json "$out/gram-other-gpu-$today.json"
step solve 60 "${liar[@]}" bench solve --device cuda --json "$out/solve-gpu-$today.json"
step cosine 45 "${liar[@]}" bench cosine --device cuda --json "$out/cosine-gpu-$today.json"
# every method on the model that ships with the package: that each runs here, and what it costs
if wanted methods; then
  read -r demo text < <("$python" -P -c 'from liar_ext.demo import *; print(MODEL, CALIBRATION)')
  step methods 120 "${liar[@]}" bench methods "${demo:-demo}" --calibration "${text:-text}" \
    --name demo --device cuda --samples 128 --seq-len 256 --batch-size 16 --target ffn,heads \
    --sparsity 0.5 --repeats 1 --search-evaluations 32 --policy-steps 32 \
    --json "$out/methods-demo-gpu-$today.json"
fi
# how fast models with the shapes of LLaMA-7B and LLaMA-3-8B answer, and the same without 30 and 50 %
# of their FFN and heads: random weights, for speed does not depend on them; first the widths that
# the GPU likes
serve() { # NAME LIMIT SHAPE SPARSITIES OPTIONS...
  local name=$1 limit=$2 shape=benchmarks/shapes/$3 models=() share
  models=("$shape")
  for share in $4; do models+=("$shape@$share"); done
  step "$name" "$limit" "${liar[@]}" bench serve "${models[@]}" --random --device cuda \
    --dtype bfloat16 --round-to auto "${@:5}" --json "$out/$name-gpu-$today.json"
}
if wanted serve; then
  STEPS="${STEPS:+$STEPS align serve-llama-7b serve-llama-3-8b}"
  step align 45 "${liar[@]}" bench align --device cuda --repeats 7 --out "$out/align-gpu-$today.json"
  for shape in llama-7b llama-3-8b; do
    serve "serve-$shape" 75 "$shape" "0.3 0.5" --batch 1,32 --prompt 512 --new-tokens 16 --repeats 7
  done
fi
# whole layers of a model with the shapes of LLaMA-7B's, half as deep: what each method takes, and
# what it saves
if wanted depth; then
  STEPS="${STEPS:+$STEPS model-depth depth-latency}"
  if step model-depth 60 "$python" -P benchmarks/random_llama.py "$work/llama" --shard 5GB \
    --layers 16 --vocabulary 32000; then
    step depth 150 "${liar[@]}" bench methods "$work/llama/model" --calibration \
      "$work/llama/tokens.npy" --name random-llama-7b-width-16-layers --device cuda --samples 64 \
      --seq-len 2048 --batch-size 8 --depth reverse --drop 3 --target-signal stream --repeats 1 \
      --json "$out/depth-llama-7b-width-gpu-$today.json"
    step depth-latency 60 "$python" -P benchmarks/depth_latency.py "$work/llama/model" \
      --device cuda --seq-len 2048 --json "$out/depth-latency-llama-7b-width-gpu-$today.json"
  else
    skip depth "there is no model"
  fi
  rm -rf "$work/llama"
fi
# whole compressions from disk to disk, of the shapes of LLaMA-7B (all of it) and of two layers of
# LLaMA-70B; the disk holds one at a time
compress() { # NAME LIMIT OPTIONS OF random_llama.py...
  local name=$1 limit=$2
  shift 2
  wanted "prune-$name" || return 0
  STEPS="${STEPS:+$STEPS model-$name}"
  if step "model-$name" 60 "$python" -P benchmarks/random_llama.py "$work/llama" --shard 5GB "$@"; then
    step "prune-$name" "$limit" "${liar[@]}" bench prune "$work/llama/model" --streamed \
      --name "random-llama-$name" --calibration "$work/llama/tokens.npy" --target ffn,heads \
      --sparsity 0.5 --samples 128 --seq-len 2048 --batch-size 8 --repeats 1 --device cuda \
      --json "$out/prune-llama-$name-gpu-$today.json"
  else
    skip "prune-$name" "there is no model to prune"
  fi
  rm -rf "$work/llama"
}
compress 7b 120 --layers 32 --vocabulary 32000
compress 70b-2-layers 60 --hidden 8192 --ffn 28672 --layers 2 --key-value-heads 8
sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
sanitize() { # TOOL LIMIT
  wanted "$1" || return 0
  if [[ -z $sanitizer ]]; then
    skip "$1" "compute-sanitizer is neither on PATH nor in \$CUDA_HOME/bin"
    return
  fi
  # without torch's caching allocator: inside its blocks an overrun touches memory that is ours.
  # 'not torch': instrumenting the libraries' kernels takes minutes and says nothing about ours
  EXPECT=' passed' step "$1" "$2" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" \
    --error-exitcode 9 --target-processes all \
    "$python" -P -m pytest -m gpu -q -p no:cacheprovider -k 'not torch' tests/bench/test_sanitized.py
}
sanitize memcheck 120
step tune 60 "${liar[@]}" bench tune --sizes 11008 --dtypes bfloat16 --out "$work/tuned.json"
# compiling a model of 32 layers takes a minute, each of them and each batch
serve serve-compile 240 llama-7b 0.5 --mode eager,compile --batch 1 --prompt 512 --new-tokens 16 \
  --repeats 7
# last, and it does not count: whether it knows copy engines, mbarriers and setmaxnreg is not known
COUNTS=0 sanitize racecheck 60

echo "written: $out/summary-gpu.json and $log; $SECONDS s"
exit "$failed"
