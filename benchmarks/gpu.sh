#!/usr/bin/env bash
# What only a GPU can show, without a network or an installation, each in less than nine minutes.
#   benchmarks/gpu.sh tests   tests/gpu; GOLDEN=FOLDER names the golden tensors
#   benchmarks/gpu.sh sanitize
#                             some of tests/gpu under compute-sanitizer: memcheck, racecheck, initcheck;
#                             sanitize TOOL runs one
#   benchmarks/gpu.sh tune    the numbers of elip_kernels/launch.py, tried against each other
#   benchmarks/gpu.sh bench   benchmarks/ against the official algorithm, eager forms and a copy;
#                             bench tower, or another NAME, runs bench_NAME.py alone; then every
#                             op's time beside the one that the model of latency.py predicts
# Results go to $OUT, or to benchmarks/results/<device>. Where the tree came without .git,
# COMMIT=$(git rev-parse HEAD) says what is measured.
set -euo pipefail
out=${OUT:+$(realpath -m "$OUT")}
golden=${GOLDEN:+$(realpath -m "$GOLDEN")}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

refuse() {
  echo "benchmarks/gpu.sh: $1" >&2
  exit 1
}

case "${1:-}" in
  tests) ;;
  sanitize)
    command -v compute-sanitizer >/dev/null ||
      refuse "expected compute-sanitizer of the CUDA toolkit on the PATH, got none"
    ;;
  tune | bench)
    [[ -n ${COMMIT:-} ]] || git rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
      refuse "expected the commit that is measured in COMMIT, as there is no .git; got none"
    ;;
  *) refuse "expected tests, sanitize, tune or bench, got '${1:-}'" ;;
esac
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) ||
  refuse "expected PyTorch and a CUDA or ROCm device, got none; run it on a machine with a GPU"
slug=$(tr '[:upper:] ' '[:lower:]-' <<<"$device" | tr -cd 'a-z0-9-')
out=${out:-benchmarks/results/$slug}
mkdir -p "$out"

# An interrupt, so that what is done by then is still reported.
limited() {
  timeout --signal=INT --kill-after=15 500 python3 "$@" 2>&1 | tee "$log"
}

log=$out/$1.txt
case $1 in
  tests)
    limited -m pytest -p no:cacheprovider -m gpu --durations=20 \
      ${golden:+--golden "$golden"} tests/gpu
    ;;
  sanitize)
    tools=(memcheck racecheck initcheck)
    [[ -z ${2:-} ]] || tools=("$2")
    rm -f "$log"
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # or a byte behind a tensor is still one of PyTorch's
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
    files=(benchmarks/bench_tower.py benchmarks/bench_[!t]*.py) # the towers say most
    [[ -z ${2:-} ]] || files=("benchmarks/bench_$2.py")
    json=$out/bench${2:+_$2}.json
    rm -f "$json"
    status=0
    limited -m pytest -p no:cacheprovider "${files[@]}" --benchmark-only --benchmark-json="$json" ||
      status=$?
    python3 -m benchmarks.predicted "$json" 2>&1 | tee -a "$log" || : # it knows few machines
    exit "$status"
    ;;
esac
