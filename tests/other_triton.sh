#!/usr/bin/env bash
# The kernels under another Triton: interpreter, compile report and its bounds, in an environment
# of their own.  usage: tests/other_triton.sh VERSION [FOLDER]
# FOLDER keeps the environment for the next run; without it, it is removed at the end.
set -euo pipefail
version=${1:?usage: tests/other_triton.sh VERSION [FOLDER]}
if [ -n "${2:-}" ]; then
  venv=$(realpath -m "$2")
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  venv=$folder/venv
fi
cd "$(dirname "$0")/.."
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" TRITON_CACHE_DIR="$venv/cache"
install() { pip install --quiet --disable-pip-version-check "$@"; }
# torch pins a triton of its own: the asked one goes in after it, as a requirement by itself.
# numpy 2.4 takes no array of one element for an int, which the interpreter of 3.6 relies on.
install torch torchvision "timm>=1.0.23" "transformers>=5.0,<6" einops safetensors "pytest>=8.3" hypothesis \
  "numpy<2.4"
install "triton==$version"
python -c "import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)"

status=0
TRITON_INTERPRET=1 python -m pytest -q -p tests.interpreted.profiles --hypothesis-profile full \
  -m "" tests/interpreted || status=1
python -m pytest -q -m "" tests/kernels/test_compile_report.py tests/kernels/test_compile_report_command.py \
  tests/kernels/test_every_op.py || status=1
python -m benchmarks.kernel_analysis || status=1
exit $status
