"""The programs of this project, run in this process: `elip`, and those of `benchmarks`."""

from collections.abc import Sequence
from typing import Any, NoReturn

import typer

from benchmarks.paper import paper
from benchmarks.studies.__main__ import study
from elip_models.cli import app, as_program, main, run_command
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


def parse(words: Sequence[str]) -> Any:
    """Return the parsed context of a command line, which is not run."""
    if words[0] == "elip":
        command, words = typer.main.get_command(app), words[1:]
    else:
        command, words = typer.main.get_command(as_program(PROGRAMS[words[2]])), words[3:]
    while words and words[0] in getattr(command, "commands", ()):
        _, command, words = command.resolve_command(typer.Context(command), [*words])
    return command.make_context("elip", [*words])  # raises for an unknown command or option


def exit_status(*words: object) -> int:
    """Exit status of a command line."""
    return status_of(run, *words)


def study_status(*arguments: object) -> int:
    """Exit status of `python -m benchmarks.studies`."""
    return exit_status("python", "-m", "benchmarks.studies", *arguments)
