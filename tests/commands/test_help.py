"""What `elip` answers before a command runs: help, version, completion and suggestions."""

import os
import re
import subprocess
import sys

import pytest
import typer

import elip_models
from elip_models import Dense
from elip_models.cli import COMMANDS, app, load_command
from tests.helpers.tiny_run import elip

LISTS_HEAVY = """
import sys
from elip_models.cli import main
HEAVY = ("numpy", "timm", "torch", "transformers")
for words in sys.argv[1].splitlines() or [""]:
    try:
        main(words.split())
    except SystemExit as exit:
        assert not exit.code
    print([words, *(name for name in HEAVY if name in sys.modules)])
"""


def process(*command, **environment):
    """Run a command with some variables of the environment and return what it printed."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_help_and_completion_import_no_heavy_library():
    printed = process("-c", LISTS_HEAVY, "--help")
    assert printed.splitlines()[-1] == "['--help']"
    assert all(f" {name} " in printed for name in COMMANDS)
    completing = {"_ELIP_COMPLETE": "complete_bash", "COMP_WORDS": "elip tr", "COMP_CWORD": "1"}
    assert process("-c", LISTS_HEAVY, "", **completing).splitlines() == ["train", "['']"]


def test_a_command_imports_no_heavy_library_before_it_works():
    lines = [*(f"{name} --help" for name in COMMANDS), "recipes"]
    printed = process("-c", LISTS_HEAVY, "\n".join(lines)).splitlines()
    assert [line for line in printed if line in map(str, ([each] for each in lines))] == [
        str([each]) for each in lines
    ]


@pytest.mark.parametrize("line", ["", *COMMANDS, "data check", "recipes show"])
def test_help_fits_80_columns_and_cuts_no_name_or_sentence(line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert elip(*line.split(), "--help") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert not re.search(r"\w(…|\.\.\.)", printed)
    command = load_command(line.split()[0]) if line else typer.main.get_command(app)
    for name in line.split()[1:]:
        command = command.commands[name]
    names = {name for parameter in command.params for name in parameter.opts if name[0] == "-"}
    assert names <= {*printed.split()}


def test_every_public_name_is_imported_on_first_use():
    classes = {strategy.__name__ for strategy in (*elip_models.STRATEGIES.values(), Dense)}
    names = {*elip_models.MODULES, *classes, "STRATEGIES"}
    assert names == set(elip_models.__all__) == set(dir(elip_models))
    for name in elip_models.__all__:
        vars(elip_models).pop(name, None)
        assert getattr(elip_models, name) is vars(elip_models)[name]
    with pytest.raises(AttributeError, match="no attribute 'reduce'"):
        elip_models.reduce  # noqa: B018


def test_an_unknown_command_is_one_line_with_a_suggestion(capsys):
    assert elip("visualise") == 2
    assert "No such command 'visualise'. Did you mean 'visualize'?" in capsys.readouterr().err
