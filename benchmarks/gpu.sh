#!/usr/bin/env bash
# Run tests and benchmarks on a GPU, without network or installation. `python -m benchmarks.gpu` is
# the short measurement for users, which prints one table.
#   benchmarks/gpu.sh tests [NAME ...]     run tests/gpu, test_device.py first, or test_NAME.py only
#   benchmarks/gpu.sh sanitize [TOOL ...]  run some of tests/gpu under compute-sanitizer with
#                                          memcheck, racecheck and initcheck, or with TOOL only
#   benchmarks/gpu.sh tune [OP ...]        try other numbers for elip_kernels/launch.py
#   benchmarks/gpu.sh bench [NAME ...]     run all benchmarks, or bench_NAME.py only
# A call ends after 500 seconds (--seconds); the same command again goes on with what is left.
# Each file, tool and sweep is a process with a limit (--limit); failures are listed at the end.
# Results and log.txt go to $OUT, or to benchmarks/results/<device>. If the source tree has no .git,
# set COMMIT=$(git rev-parse HEAD), the commit that is measured.
set -euo pipefail
out=${OUT:+$(realpath -m "$OUT")}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name())' 2>/dev/null) || {
  echo "device: expected PyTorch with a CUDA or ROCm device, got none; use a machine with a GPU" >&2
  exit 1
}
out=${out:-benchmarks/results/$(tr '[:upper:] ' '[:lower:]-' <<<"$device" | tr -cd 'a-z0-9-')}
mkdir -p "$out"
python3 -m benchmarks.gpu_run --device "$device" --out "$out" "$@" 2>&1 | tee -a "$out/log.txt"
