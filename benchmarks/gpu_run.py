"""The steps of benchmarks/gpu.sh, which describes the commands and their results.

Each step is a process with a limit. `steps.json` has the outcome of each finished step, so that the
same command again runs only what is left. A step is left if the call had no time for it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from elip_models.profiling.commit import commit

LIMITS = {"tests": 300, "sanitize": 300, "tune": 180, "bench": 400}
"""Commands, and the seconds of one step at most."""
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
SANITIZED = ("-m", "gpu", "-k", "empty or any_width or score_reduce", "tests/gpu/test_accuracy.py")
TO_BE_CONTINUED = 75  # exit status of a step that is left
KILL_AFTER = 15  # seconds between an interrupt, on which Python writes its results, and the end


class Step(NamedTuple):
    """A process, and the JSON of benchmarks that it writes."""

    name: str
    words: tuple[str, ...]
    results: Path | None = None


def steps(command: str, out: Path, limit: float) -> list[Step]:
    """Return all steps of a command."""
    match command:
        case "tests":
            return [_test(file, out) for file in _files("tests/gpu/test_device.py")]
        case "sanitize":
            # PyTorch's cache of memory hides accesses beyond a tensor.
            words = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer")
            return [
                Step(tool, (*words, "--error-exitcode", "1", "--tool", tool, *PYTEST, *SANITIZED))
                for tool in ("memcheck", "racecheck", "initcheck")
            ]
        case "tune":
            from benchmarks.sweeps import SWEEPS

            words = (sys.executable, "-m", "benchmarks.tune", "--out", str(out / "tune.json"))
            words += ("--seconds", str(2 * limit / 3))
            return [Step(str(sweep), (*words, str(sweep))) for sweep in SWEEPS]
    return [_bench(file, out) for file in _files("benchmarks/bench_tower.py")]


def _files(first: str) -> list[Path]:
    """Return a file of tests or benchmarks, and then the others of its folder."""
    path, kind = Path(first), first.rpartition("/")[2].partition("_")[0]
    return [path, *sorted({*path.parent.glob(f"{kind}_*.py")} - {path})]


def _test(file: Path, out: Path) -> Step:
    """Return the run of a test file; times, and tests of streams and memory, need the GPU alone."""
    words = (*PYTEST, "-m", "gpu", "--durations=20", f"--junitxml={out / file.stem}.xml", str(file))
    name, cores = file.stem.removeprefix("test_"), os.cpu_count() or 1
    if name not in ("device", "benchmarks") and cores > 3 and find_spec("xdist") is not None:
        words += ("-n", str(min(8, cores // 2)))
    return Step(name, words)


def _bench(file: Path, out: Path) -> Step:
    part = out / f"{file.stem}.part"
    words = (*PYTEST, "--benchmark-only", f"--benchmark-json={part}", str(file))
    return Step(file.stem.removeprefix("bench_"), words, part)


def chosen(every: list[Step], names: list[str]) -> list[Step]:
    """Return the steps of some names or, for sweeps, ops.

    Raises:
        ValueError: there is no such step.
    """
    unknown = set(names) - {part for s in every for part in (s.name, s.name.partition(".")[0])}
    if unknown:
        known = [step.name for step in every]
        raise ValueError(f"NAME: expected some of {known}, got {sorted(unknown)}")
    wanted = set(names) or {step.name for step in every}
    return [step for step in every if wanted & {step.name, step.name.partition(".")[0]}]


def finish(step: Step, seconds: float) -> int | None:
    """Run a step and return its exit status, or None if it was interrupted after `seconds`.

    SIGINT lets pytest write what it has. A job in the background of a shell ignores it, and so
    would the step, unless this process handles it.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if step.results is not None:
        step.results.unlink(missing_ok=True)
    process = subprocess.Popen(step.words, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_AFTER)
        return None
    finally:
        with suppress(ProcessLookupError):  # the processes that it started, which use the GPU
            os.killpg(process.pid, signal.SIGKILL)


def append(part: Path, path: Path) -> None:
    """Add the results of a file of benchmarks to those of other files."""
    content = json.loads(part.read_text())
    if path.exists():
        earlier, new = json.loads(path.read_text()), content
        content = earlier | {"benchmarks": earlier["benchmarks"] + new["benchmarks"]}
        content["run"] = {what: earlier["run"][what] + new["run"][what] for what in new["run"]}
    write(path, content)
    part.unlink()


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, completely or not at all, without the seconds in which PyTorch is imported."""
    whole = path.with_suffix(".new")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(path)


def run(command: str, todo: list[Step], out: Path, state: dict[str, Any], options: Any) -> int:
    """Run what is not finished, list all outcomes and return the exit status: 0 if all passed."""
    end, outcomes, is_first = time.monotonic() + options.seconds, state["outcomes"], True
    for step in todo:
        key, left = f"{command}/{step.name}", end - time.monotonic()
        if key in outcomes or left <= 0:
            continue
        seconds = min(options.limit, left)
        # A killed step leaves half a line.
        sys.stdout.write(f"\n=== {key}: {seconds:.0f} s at most\n")
        status = finish(step, seconds)
        is_cut, is_first = status is None and left < options.limit and not is_first, False
        if is_cut or status == TO_BE_CONTINUED:
            continue
        outcomes[key] = f"failed with exit status {status}" if status else "passed"
        if status is None:
            outcomes[key] = f"failed: interrupted after {seconds:.0f} s"
        if step.results is not None and step.results.exists():
            append(step.results, out / "bench.json")
        write(out / "steps.json", state)
    keys = [f"{command}/{step.name}" for step in todo]
    sys.stdout.write("\n" + "".join(f"{key}: {outcomes.get(key, 'left')}\n" for key in keys))
    return 0 if all(outcomes.get(key) == "passed" for key in keys) else 1


def main() -> int:
    """Parse the command line, run the steps and return the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh")
    parser.add_argument("--device", required=True, help="the name of the GPU")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=500, help="of this call at most")
    parser.add_argument("--limit", type=float, help="seconds of one step at most")
    parser.add_argument("command", choices=LIMITS)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of files, tools or ops")
    options = parser.parse_args()
    options.limit = min(options.limit or LIMITS[options.command], options.seconds)
    state = {"device": options.device, "commit": commit(), "outcomes": {}}
    if not state["commit"]:
        parser.error("COMMIT: expected the measured commit, got none; set COMMIT=HASH")
    if (path := options.out / "steps.json").exists():
        earlier = json.loads(path.read_text())
        if earlier | {"outcomes": {}} != state:
            own = f"{options.device} and {state['commit']}"
            other = f"{earlier['device']} and {earlier['commit']}"
            parser.error(f"OUT: expected results of {own}, got those of {other}; set OUT=FOLDER")
        state = earlier
    if options.command == "sanitize" and shutil.which("compute-sanitizer") is None:
        parser.error("PATH: expected compute-sanitizer, got none; install the CUDA toolkit")
    try:
        todo = chosen(steps(options.command, options.out, options.limit), options.names)
    except ValueError as error:
        parser.error(str(error))
    return run(options.command, todo, options.out, state, options)


if __name__ == "__main__":
    sys.exit(main())
