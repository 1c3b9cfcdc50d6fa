#!/usr/bin/env bash
# Run tests and benchmarks on a GPU, without network or installation, each in less than nine minutes.
#   benchmarks/gpu.sh tests            run tests/gpu
#   benchmarks/gpu.sh sanitize [TOOL]  run some of tests/gpu under compute-sanitizer with memcheck,
#                                      racecheck and initcheck, or with TOOL only
#   benchmarks/gpu.sh tune             try other numbers for elip_kernels/launch.py
#   benchmarks/gpu.sh bench [NAME]     run all benchmarks, or bench_NAME.py only, and compare the
#                                      times of the ops with the prediction of latency.py
# Results go to $OUT, or to benchmarks/results/<device>. If the source tree has no .git, set
# COMMIT=$(git rev-parse HEAD), the commit that is measured.
set -euo pipefail
out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

fail() {
  echo "benchmarks/gpu.sh: $1" >&2
  exit 1
}

case "${1:-}" in
  tests) ;;
  sanitize)
    command -v compute-sanitizer >/dev/null ||
      fail "PATH: expected compute-sanitizer, got none; install the CUDA toolkit"
    ;;
  tune | bench)
    [[ -n ${COMMIT:-} ]] || git rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
      fail "COMMIT: expected the measured commit, because there is no .git, got none; set COMMIT=HASH"
    ;;
  *) fail "command: expected tests, sanitize, tune or bench, got '${1:-}'" ;;
esac
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) ||
  fail "device: expected PyTorch with a CUDA or ROCm device, got none; use a machine with a GPU"
slug=$(tr '[:upper:] ' '[:lower:]-' <<<"$device" | tr -cd 'a-z0-9-')
out=${out:-benchmarks/results/$slug}
mkdir -p "$out"

# SIGINT lets Python report the results so far.
limited() {
  timeout --signal=INT --kill-after=15 500 python3 "$@" 2>&1 | tee "$log"
}

log=$out/$1.txt
case $1 in
  tests)
    limited -m pytest -p no:cacheprovider -m gpu --durations=20 tests/gpu
    ;;
  sanitize)
    tools=(memcheck racecheck initcheck)
    [[ -z ${2:-} ]] || tools=("$2")
    rm -f "$log"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # else PyTorch's cache hides accesses beyond a tensor
    for tool in "${tools[@]}"; do
      timeout --signal=INT --kill-after=15 "$((500 / ${#tools[@]}))" \
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
        python3 -m pytest -p no:cacheprovider -q -m gpu -k "empty or any_width or score_reduce" \
        tests/gpu/test_accuracy.py 2>&1 | tee -a "$log"
    done
    ;;
  tune)
    limited -m benchmarks.tune --out "$out/tune.json" --seconds 440
    ;;
  bench)
    files=(benchmarks/bench_tower.py benchmarks/bench_[!t]*.py) # the towers first
    [[ -z ${2:-} ]] || files=("benchmarks/bench_$2.py")
    json=$out/bench${2:+_$2}.json
    rm -f "$json"
    status=0
    limited -m pytest -p no:cacheprovider "${files[@]}" --benchmark-only --benchmark-json="$json" ||
      status=$?
    python3 -m benchmarks.predicted "$json" 2>&1 | tee -a "$log" || : # fails for machines without a model
    exit "$status"
    ;;
esac
