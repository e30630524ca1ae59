#!/usr/bin/env bash
# build, gpu tests, compute-sanitizer and gpu benchmarks in under ten minutes, on a machine with a GPU
#
#   OUT=folder      where the JSON goes (default benchmarks/results)
#   PYTHON=python3  an interpreter whose torch sees the GPU
#   BUDGET=570      seconds for everything; a step that no time is left for is recorded as such
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
  echo "error: $python lacks ${missing[*]}: install them, or put their wheels on PYTHONPATH" >&2
  exit 2
fi
if ! mkdir -p "$out"; then
  echo "error: OUT=$out cannot be made" >&2
  exit 2
fi

# a folder of its own for what is built and made: a borrowed machine stays as it was
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT  # until there is a summary to write
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_CACHE_DIR="$work/triton" HF_HUB_OFFLINE=1
liar=("$python" -P "$work/site/bin/liar")
log=$out/gpu.log
: >"$log"
records=()
failed=0

record() { # NAME RC SECONDS REASON; RC is null for what was not run
  records+=("$(printf '{"step": "%s", "rc": %s, "seconds": %s, "reason": "%s"}' "$@")")
  printf -- '-- %s: rc %s, %s s %s\n' "$@" | tee -a "$log"
}

skip() { # NAME REASON
  record "$1" null 0 "$2"
}

step() { # NAME LIMIT COMMAND...; fails as well if the output lacks what EXPECT holds
  local name=$1 limit=$2 left=$((budget - SECONDS)) start=$SECONDS rc reason=""
  shift 2
  if ((left < 3)); then
    failed=1
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
  ((rc != 0)) && failed=1
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
  local environment=null
  [[ -s $work/environment.json ]] && environment=$(<"$work/environment.json")
  {
    printf '{"benchmark": "gpu.sh", "date": "%s", "seconds": %s, "environment": %s,\n "steps": [\n  ' \
      "$today" "$SECONDS" "$environment"
    local separator="" item
    for item in "${records[@]}"; do
      printf '%s%s' "$separator" "$item"
      separator=$',\n  '
    done
    printf '\n]}\n'
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
if step environment 40 "${liar[@]}" env --json; then
  # the last line of its output; warnings may come after it
  grep '^{' "$work/step.txt" | tail -n 1 >"$work/environment.json"
fi
parallel=()
# compiling the kernels keeps a core busy and the GPU idle
"$python" -P -c 'import xdist' 2>/dev/null && parallel=(-n 4 --dist loadfile)
# tests that were all skipped prove nothing
EXPECT=' passed' step pytest 170 "$python" -P -m pytest -m gpu -q -p no:cacheprovider \
  --durations=5 "${parallel[@]}"
step gram 120 "${liar[@]}" bench gram --device cuda --json "$out/gram-gpu-$today.json"
step solve 60 "${liar[@]}" bench solve --device cuda --json "$out/solve-gpu-$today.json"
if step model 40 "$python" -P benchmarks/random_llama.py "$work/llama"; then
  step prune-llama 60 "${liar[@]}" bench prune "$work/llama/model" --name random-llama-4096x4 \
    --calibration "$work/llama/tokens.npy" --target ffn,heads --sparsity 0.5 --samples 64 \
    --seq-len 2048 --batch-size 8 --repeats 3 --device cuda \
    --json "$out/prune-random-llama-gpu-$today.json"
else
  skip prune-llama "there is no model to prune"
fi
sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck; do
  if [[ -z $sanitizer ]]; then
    skip "$tool" "compute-sanitizer is neither on PATH nor in \$CUDA_HOME/bin"
    continue
  fi
  # without torch's caching allocator: inside its blocks an overrun touches memory that is ours
  EXPECT=' passed' step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
    --error-exitcode 9 --target-processes all \
    "$python" -P -m pytest -m gpu -q -p no:cacheprovider tests/bench/test_sanitized.py
done
step tune 60 "${liar[@]}" bench tune --sizes 11008 --dtypes bfloat16 --out "$out/gram-tuned-gpu.json" \
  --json "$out/tune-gpu-$today.json"
demo=$("$python" -P -c 'import liar_ext.demo as d; print(d.FOLDER)' 2>>"$log")
step prune-demo 40 "${liar[@]}" bench prune "$demo/model" --name demo \
  --calibration "$demo/calibration.txt" --target ffn,heads --sparsity 0.5 --seq-len 256 \
  --repeats 5 --device cuda --json "$out/prune-demo-gpu-$today.json"

echo "written: $out/summary-gpu.json and $log; $SECONDS s"
exit "$failed"
