#!/usr/bin/env bash
# build, gpu tests and gpu benchmarks on a machine with a GPU; writes under ${OUT:-benchmarks/results}
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
# -P: the repository root must not be on sys.path, its kernels/ would hide the PyPI package
if ! "$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "error: $python has no torch that sees a CUDA device; set PYTHON to one that has" >&2
  exit 2
fi
missing=()
for package in pytest pybind11 greenlet rich; do
  "$python" -P -c "import $package" 2>/dev/null || missing+=("$package")
done
if ((${#missing[@]})); then
  echo "error: $python lacks ${missing[*]}: install them, or put their wheels on PYTHONPATH" >&2
  exit 2
fi
mkdir -p "$out"

# into a folder of its own: the environment of a borrowed machine stays as it was
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export LIAR_EXT_BUILD=${LIAR_EXT_BUILD:-auto}
"$python" -P -m pip install --quiet --no-deps --no-build-isolation --target "$site" .
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

"$python" -P "$site/bin/liar" env --json | tee "$out/env-gpu.json"
"$python" -P -m pytest -m gpu -q --durations=5 2>&1 | tee "$out/pytest-gpu.txt"
"$python" -P "$site/bin/liar" bench gram --device cuda --sizes 4096 11008 14336 --tokens 16384 \
  --repeats 20 --json "$out/gram-gpu-$(date +%F).json"
