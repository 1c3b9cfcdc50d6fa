"""Compile every kernel and report its code: python -m benchmarks.kernel_analysis report.

No GPU is needed. The exit status is 1 if a kernel does not compile, or does not fit an SM or CU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.kernel_analysis.compile import ARCHITECTURES
from benchmarks.kernel_analysis.report import report, tables
from elip_kernels._triton import triton
from elip_kernels.testing import WITH_KERNELS
from elip_models.saving.files import write_file


def main() -> int:
    """Parse the command line, compile, write the report and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_analysis", description=__doc__
    )
    command = parser.add_subparsers(required=True).add_parser("report", help="compile and count")
    names = {str(arch): arch for arch in ARCHITECTURES}
    command.add_argument("--arch", nargs="+", choices=names, default=list(names))
    command.add_argument(
        "--only", nargs="+", choices=WITH_KERNELS, default=WITH_KERNELS, metavar="OP"
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    options = parser.parse_args()
    rows = report([names[name] for name in options.arch], options.only)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    sys.stdout.write(tables(rows) + "\n" + " ".join(map(" ".join, versions.items())) + "\n")
    if options.json:
        document = json.dumps(versions | {"rows": rows}, indent=1) + "\n"
        write_file(options.json, document.encode())
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
