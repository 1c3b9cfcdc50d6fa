"""The command line: runs cases of every kind and prints a table of what became of them."""

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests import fuzz
from tests.fuzz.harness import FAILURES, KINDS, OUTCOMES, run

LIBRARIES = ("open_clip", "peft", "timm", "transformers")
"""Imported once, before a case is forked."""
FIXED = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def import_kinds():
    for library in LIBRARIES:
        importlib.import_module(library)
    for module in pkgutil.iter_modules(fuzz.__path__):
        if module.name.endswith("_cases"):
            importlib.import_module(f"tests.fuzz.{module.name}")


def counts(count, only, without=()):
    """How many cases each kind has: its share of all, at least one."""
    chosen = {name: KINDS[name] for name in only or sorted(KINDS) if name not in without}
    whole = sum(kind.share for kind in chosen.values())
    return {name: max(1, round(count * kind.share / whole)) for name, kind in chosen.items()}


def table(cases, seed, root, numbers=None):
    """Outcomes of each kind, and a line for each failure."""
    outcomes, failures = {}, []
    for name, count in cases.items():
        start, outcomes[name] = time.monotonic(), Counter()
        prepared = root / "prepared" / name if KINDS[name].prepare else None
        if prepared:
            prepared.mkdir(parents=True)
            KINDS[name].prepare(prepared)
        for number in numbers or range(count):
            outcome = run(name, seed, number, root, prepared)
            outcomes[name][outcome.name] += 1
            if outcome.name in FAILURES:
                case = f"--only {name} --seed {seed} --number {number}"
                failures.append(f"{case}: {outcome.name} {outcome.detail}")
        sys.stderr.write(f"{name}: {time.monotonic() - start:.0f} s\n")
    return outcomes, failures


def main():
    parser = argparse.ArgumentParser(description=fuzz.__doc__)
    parser.add_argument("--count", type=int, default=3000, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    import_kinds()
    parser.add_argument("--only", nargs="*", default=(), choices=sorted(KINDS))
    parser.add_argument("--without", nargs="*", default=(), choices=sorted(KINDS))
    parser.add_argument("--number", type=int, nargs="*", help="these cases of each kind alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no threads of its parent
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        os.environ.update(FIXED, HOME=f"{root}/home", HF_HOME=f"{root}/home/hf")
        os.environ["XDG_CACHE_HOME"] = f"{root}/home/cache"
        (root / "home").mkdir()
        cases = counts(options.count, options.only, options.without)
        outcomes, failures = table(cases, options.seed, root, options.number)
    columns = (*OUTCOMES, *FAILURES)
    sys.stdout.write(
        f"| kind | tried | {' | '.join(columns)} |\n{'| --- ' * (2 + len(columns))}|\n"
    )
    for name, counted in (*outcomes.items(), ("all", sum(outcomes.values(), Counter()))):
        values = [counted.total(), *(counted[column] for column in columns)]
        sys.stdout.write(f"| {name} | {' | '.join(map(str, values))} |\n")
    sys.stdout.write("\n".join([*failures, f"{len(failures)} failures", ""]))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
