"""Analyse the kernels without a GPU.

    python -m benchmarks.kernel_analysis report
    TRITON_INTERPRET=1 python -m benchmarks.kernel_analysis waits

`report` compiles every kernel and reports its code; the exit status is 1 if a kernel does not
compile, or does not fit an SM or CU. `waits` counts how often a program waits for memory, for one
image of a ViT-B with 257 tokens.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.kernel_analysis.compile import ARCHITECTURES
from benchmarks.kernel_analysis.report import DTYPES, HEADS, WIDTH, report, table
from benchmarks.kernel_analysis.waits import counted_waits
from elip_kernels._triton import is_interpreted, triton
from elip_kernels.testing import REAL_CASES, WITH_KERNELS, call, launchers_on_cpu
from elip_models.saving.files import write_file


def main() -> int:
    """Parse the command line, analyse the kernels and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    names = {str(arch): arch for arch in ARCHITECTURES}
    of_code = commands.add_parser("report", help="compile and count")
    of_code.add_argument("--arch", nargs="+", choices=names, default=list(names))
    of_code.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    of_waits = commands.add_parser("waits", help="count waits in Triton's interpreter")
    of_waits.add_argument("--dtype", choices=DTYPES, default="bf16")
    for command in (of_code, of_waits):
        command.add_argument(
            "--only", nargs="+", choices=WITH_KERNELS, default=WITH_KERNELS, metavar="OP"
        )
    options = parser.parse_args()
    if options.command == "waits":
        if not is_interpreted():
            parser.error("TRITON_INTERPRET: expected 1 in the environment, which counting needs")
        for op in options.only:
            sys.stdout.write(waits_of(op, options.dtype) + "\n")
        return 0
    rows = report([names[name] for name in options.arch], options.only)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    sys.stdout.write(table(rows) + "\n" + " ".join(map(" ".join, versions.items())) + "\n")
    if options.json:
        document = json.dumps(versions | {"rows": rows}, indent=1) + "\n"
        write_file(options.json, document.encode())
    return int(any("error" in row for row in rows))


def waits_of(op: str, dtype: str) -> str:
    """Return a line with the waits of each kernel of an op, forward and backward."""
    N, K = next(case for case in REAL_CASES if case[0] == 257)
    with launchers_on_cpu(), counted_waits() as launches:
        call(op, 1, N, WIDTH, K, HEADS, DTYPES[dtype])
    return f"{op}: " + ", ".join(f"{launch.kernel} {launch.waits}" for launch in launches)


if __name__ == "__main__":
    sys.exit(main())
