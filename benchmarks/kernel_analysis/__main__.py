"""Print one table of all kernels, without a GPU: compiled code and memory traffic.

    python -m benchmarks.kernel_analysis [--only OP ...] [--arch ARCH ...] [--json PATH]

The exit status is 1 if a kernel does not compile, or does not fit an SM or CU.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.kernel_analysis.compile import ARCHITECTURES
from benchmarks.kernel_analysis.report import report, table
from elip_kernels._triton import triton
from elip_kernels.testing import WITH_KERNELS
from elip_models.saving.files import write_file


def main() -> int:
    """Parse the command line, analyse the kernels and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_analysis",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = {str(arch): arch for arch in ARCHITECTURES}
    parser.add_argument("--arch", nargs="+", choices=names, default=list(names))
    parser.add_argument(
        "--only", nargs="+", choices=WITH_KERNELS, default=WITH_KERNELS, metavar="OP"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    options = parser.parse_args()
    rows = report([names[name] for name in options.arch], options.only)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    sys.stdout.write(table(rows) + "\n" + " ".join(map(" ".join, versions.items())) + "\n")
    if options.json:
        document = json.dumps(versions | {"rows": rows}, indent=1) + "\n"
        write_file(options.json, document.encode())
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
