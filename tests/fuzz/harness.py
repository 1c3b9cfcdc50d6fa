"""Run one hostile case in a forked process, and return its outcome.

A case is a function `case(folder, rng)`. It makes a hostile input in its folder, gives it to the
library, and returns "read", "reported" (read, and each loss is counted) or "refused" (by a
documented error). Anything else is a failure: an exception that escapes, a crash, more than the
kind's seconds, more than two gigabytes, a file written outside of the folder, code of the input
that ran, and a loss that was not reported.
"""

import contextlib
import os
import random
import resource
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

SECONDS = 10
GIGABYTES = 2
MARKER = "CODE_RAN"
"""The environment variable with the file that code of an input must write, if it runs."""
OUTCOMES = ("read", "reported", "refused")
FAILURES = ("traceback", "hang", "memory", "outside", "code run", "loss")


class Loss(Exception):
    """Something was lost or wrong, and nothing said so."""


class Kind(NamedTuple):
    """A kind of case: its function, its share of all cases, what makes files, and its limit."""

    case: Callable[..., str]
    share: float
    prepare: Callable[[Path], None] | None
    seconds: float = SECONDS


class Outcome(NamedTuple):
    """One of OUTCOMES or FAILURES, and for a failure what was seen."""

    name: str
    detail: str = ""


KINDS: dict[str, Kind] = {}


def kind(share=1.0, prepare=None, seconds=SECONDS):
    """Register a case, which may take so many seconds.

    `prepare(folder)` fills a folder once; the case is then called with it: (folder, rng, prepared).
    """

    def register(case):
        KINDS[case.__name__] = Kind(case, share, prepare, seconds)
        return case

    return register


def refused(error, *names):
    """Return "refused" for a documented error, whose message must name these."""
    missing = [name for name in names if name not in str(error)]
    if missing:
        raise Loss(f"{missing} not named: {error}")
    return "refused"


def run(name, seed, number, root, prepared=None):
    """The outcome of one case, in a forked process with a folder of its own."""
    folder = root / "cases" / "case" / "folder"  # files of ../ and ../../ are found
    folder.mkdir(parents=True)
    (root / "answers").write_text("y\n" * 1000)
    marker, before = root / "marker", _files(root, folder)
    report, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(report)
        sys.stdin = (root / "answers").open()
        os.environ[MARKER] = str(marker)
        rng = random.Random(f"{name} {seed} {number}")
        arguments = (folder, rng, prepared) if prepared else (folder, rng)
        _child(partial(KINDS[name].case, *arguments), folder, write)
    os.close(write)
    outcome = _wait(process, report, KINDS[name].seconds)
    if marker.exists():
        marker.unlink()
        outcome = Outcome("code run", outcome.detail)
    outside = _files(root, folder) ^ before
    if outside and outcome.name in OUTCOMES:
        outcome = Outcome("outside", f"{sorted(outside)[:3]}")
    shutil.rmtree(root / "cases")
    return outcome


def _child(case, folder, write):
    """Run a case and write its outcome to a pipe; ends the process."""
    os.setsid()
    os.chdir(folder)
    os.dup2(sys.stdin.fileno(), 0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    limit = 2 * GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        warnings.simplefilter("ignore")
        said = case()
        said = said if said in OUTCOMES else f"traceback expected one of {OUTCOMES}, got {said!r}"
    except Loss as error:
        said = f"loss {error}"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        name = "memory" if _is_out_of_memory(error) else "traceback"
        said = f"{name} {type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    os.write(write, said.encode(errors="replace")[:4096])
    os._exit(0)


def _is_out_of_memory(error):
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _wait(process, report, seconds):
    """The outcome of a child: what it wrote, or how it ended."""
    is_ready, _, _ = select.select([report], [], [], seconds)
    said = os.read(report, 4096).decode(errors="replace") if is_ready else ""
    os.close(report)
    if not is_ready:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it started
    if not is_ready:
        return Outcome("hang", f"more than {seconds} s")
    if not said:
        return Outcome(
            "traceback",
            f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
            if os.WIFSIGNALED(status)
            else f"ended with {os.WEXITSTATUS(status)}",
        )
    peak = usage.ru_maxrss / 2**20
    if peak > GIGABYTES:
        return Outcome("memory", f"{peak:.1f} GiB; {said}")
    names = sorted((*OUTCOMES, *FAILURES), key=len, reverse=True)
    name = next(name for name in names if said.startswith(name))
    return Outcome(name, said.removeprefix(name).strip())


def _files(root, case):
    """Names and sizes of all files outside of the case's folder and of the home with its caches."""
    sizes = {}
    for folder, folders, files in os.walk(root):
        paths = [Path(folder) / name for name in folders]
        folders[:] = [path.name for path in paths if path not in (case, root / "home")]
        sizes |= {f"{path}/": 0 for path in paths}
        sizes |= {f"{folder}/{name}": os.lstat(f"{folder}/{name}").st_size for name in files}
    sizes.pop(f"{root}/marker", None)
    return set(sizes.items())
