"""The command line `elip`.

    elip train RECIPE [key=value ...]      elip finetune TASK --from CHECKPOINT
    elip eval TASK --model RUN --data D    elip visualize
    elip profile                           elip export MODEL OUT.onnx
    elip convert
    elip data check SPEC                   python -m elip_models ..
    elip recipes [show NAME]               elip models [FILTER]
    elip strategies [MODEL]
    elip calibrate MODEL IMAGES            elip distill MODEL IMAGES
    elip demo [MODEL]
    elip embed SOURCE --model MODEL --output FOLDER
    elip search FOLDER QUERY               elip index FOLDER

An error of the user is one line on standard error with exit status 2; a bug is a traceback.
"""

import io
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

from elip_models.validation import (
    ConfigError,
    DataError,
    MissingExtraError,
    Stopped,
    TrainingError,
    install_command,
    require_extra,
)

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.core import TyperGroup
except ImportError as error:
    sys.stderr.write(f"elip needs the train extra: {install_command('train')} ({error})\n")
    raise SystemExit(2) from None

COMMANDS = {
    "train": (
        "train.train",
        "Train by a recipe, then report. On several GPUs: torchrun -m elip_models.cli train ..",
    ),
    "finetune": (
        "finetune.finetune",
        "Fine-tune a model for a downstream task, then score it.",
    ),
    "calibrate": (
        "calibrate.calibrate",
        "Find the fastest reduction whose loss by your own measure is within a tolerance.",
    ),
    "distill": (
        "distill.distill",
        "Train a reduced model, without labels, to give the dense model's features.",
    ),
    "embed": (
        "embed.embed",
        "Embed a collection of images: one vector for each, as Parquet files.",
    ),
    "search": (
        "search.search",
        "Search in a folder of embeddings by a text or an image.",
    ),
    "index": (
        "search.index",
        "Build an index of faiss beside the embeddings, which makes a search in many of them fast.",
    ),
    "visualize": (
        "inspect_model.visualize",
        "Draw kept and merged patches of images or clips, the CLS attention and its concentration.",
    ),
    "demo": (
        "demo.demo",
        "Open a local page: what a reduction merges in your images, and what it changes.",
    ),
    "profile": (
        "inspect_model.profile",
        "Compare tokens, FLOPs, time and memory of models with token reduction to dense.",
    ),
    "convert": (
        "convert.convert",
        "Convert a checkpoint of another library to a model of this one, or the reverse.",
    ),
    "export": (
        "export.export",
        "Write a reduced model as an ONNX file, and compare onnxruntime to PyTorch.",
    ),
    "eval": ("evaluate.evaluate", "Score a trained model."),
    "data": ("data.app", "Check data."),
    "recipes": ("recipes.app", "List the recipes, or show the settings of one."),
    "models": (
        "models.models",
        "List the models that can be reduced; with FILTER, check timm models by name.",
    ),
    "strategies": (
        "strategies.strategies",
        "List the strategies; with MODEL, those that can reduce it, and why others cannot.",
    ),
}
"""The place of each command in `elip_models.commands`, imported when it is called, and its help."""
STYLE: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}
"""Of the programs of typer. In 80 columns, the panels of rich would cut the names of options."""


class CommandGroup(TyperGroup):
    """The commands of `elip`: their names and help, until one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the name of the command that is called, the command and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the whole help of each command, where click would cut it to one line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in self.commands.items()])


def load_command(name: str) -> Any:
    """Import the command or group `name` and return it as typer's command."""
    module, attribute = COMMANDS[name][0].split(".")
    loaded = getattr(import_module(f"elip_models.commands.{module}"), attribute)
    if isinstance(loaded, typer.Typer):
        return typer.main.get_group(loaded)
    return typer.main.get_command(as_program(loaded, name))


def as_program(command: Callable[..., None], name: str | None = None) -> typer.Typer:
    """Return a program with one command, whose options are the arguments of a function."""
    program = typer.Typer(add_completion=False, **STYLE)
    program.command(name)(command)
    return program


app = typer.Typer(cls=CommandGroup, no_args_is_help=True, **STYLE)
for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        from elip_kernels import __version__

        typer.echo(f"elip {__version__}")
        raise typer.Exit


@app.callback()
def elip(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run, train and measure vision transformers with fewer tokens."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the console script `elip`; `arguments` default to those of the process."""
    _run(app, arguments, "elip")


def run_command(
    command: Callable[..., None], arguments: Sequence[str] | None = None, *, name: str
) -> NoReturn:
    """Run a function as the program `name`, with the options and errors of a command of `elip`."""
    _run(as_program(command), arguments, name)


def _run(program: typer.Typer, arguments: Sequence[str] | None, name: str) -> NoReturn:
    for library in ("torchao", "torch.utils._pytree"):  # warnings of imports, not of the command
        logging.getLogger(library).setLevel(logging.ERROR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be valid text
    try:
        with require_extra("this"):
            program(args=arguments, prog_name=name)
    except MissingExtraError as error:
        _exit_with(str(error))
    except Stopped as stopped:
        _exit_with(str(stopped), stopped.status)
    except (ConfigError, DataError, TrainingError) as error:
        _exit_with(str(error))
    except OSError as error:  # such as a full disk
        named = f"{error.filename!s:.300}: " if error.filename is not None else ""
        _exit_with(f"{named}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        phrases = "allocate memory", "out of memory"  # on a CPU, on a GPU
        if not isinstance(error, MemoryError) and not any(
            phrase in str(error) for phrase in phrases
        ):
            raise
        _exit_with(f"the memory is too small for these sizes ({error!s:.200}); use smaller ones")
    raise SystemExit(0)


def _exit_with(message: str, status: int = 2) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False
    )
    raise SystemExit(status)


if __name__ == "__main__":
    main()
