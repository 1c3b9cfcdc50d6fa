"""The programs of this project, run in this process: `elip`, and those of `benchmarks`."""

from collections.abc import Sequence
from typing import NoReturn

from benchmarks.paper import paper
from benchmarks.studies.__main__ import study
from elip_models.cli import main, run_command
from tests.helpers.tiny_run import status_of

PROGRAMS = {
    "benchmarks.paper": paper,
    "benchmarks.studies": study,
}
"""Function of each module that is run as `python -m MODULE`."""


def run(words: Sequence[str]) -> NoReturn:
    """Run the words of a command line, `elip ..` or `python -m MODULE ..`."""
    if words[0] == "elip":
        main(words[1:])
    python, option, module, *arguments = words
    assert (python, option) == ("python", "-m")
    run_command(PROGRAMS[module], arguments, name=f"python -m {module}")


def exit_status(*words: object) -> int:
    """Exit status of a command line."""
    return status_of(run, *words)


def study_status(*arguments: object) -> int:
    """Exit status of `python -m benchmarks.studies`."""
    return exit_status("python", "-m", "benchmarks.studies", *arguments)
