"""Link the photographs that the panel does not measure into one folder, without their labels.

    python -m benchmarks.real.unmeasured FOLDER POOL
    elip distill timm:local-dir:DINOV2 POOL --strategy resize_merge --keep 0.5 --steps 500 \\
        --output distilled_resize_merge

They are the unmeasured photographs of `SETS`, and the training split of the groceries. Of the other
sets all photographs are measured, or they are held out.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.real import sets
from benchmarks.real.variants import SETS

SPLIT = "groceries"


def unmeasured(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield a name and the path of each photograph, the groceries last."""
    for name in SETS:
        measured = {path.resolve() for path in sets.read(folder, name).paths}
        for i, path in enumerate(sets.read(folder, name, explore=True).paths):
            if path.resolve() in measured:
                raise ValueError(f"sets: expected unmeasured photographs, got {path}")
            yield f"{name}_{i:05d}{path.suffix.lower()}", path
    found = sets.read(folder, SPLIT)
    for i in found.folds[0].train.tolist():
        yield f"{SPLIT}_{i:05d}{found.paths[i].suffix.lower()}", found.paths[i]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.real.unmeasured", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="the materials, see sets.py")
    parser.add_argument("pool", type=Path, help="the new folder of links")
    options = parser.parse_args(arguments)
    try:
        links = dict(unmeasured(options.folder))
        options.pool.mkdir(parents=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name, path in links.items():
        os.symlink(path.resolve(), options.pool / name)
    Console().print(f"{options.pool}: {len(links)} photographs", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
