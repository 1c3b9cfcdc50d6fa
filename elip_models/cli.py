"""The command line `elip`.

    elip train RECIPE [key=value ...]      elip finetune TASK --from CHECKPOINT
    elip eval retrieval | vqa | ..         elip visualize
    elip profile                           elip study NAME
    elip convert                           elip data check | export

An error of the user is one line on standard error with exit status 2; a bug is a traceback.
"""

import io
import sys
from collections.abc import Sequence
from typing import NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape

    from elip_models.commands import convert, data, evaluate, finetune, inspect_model, train
    from elip_models.data import DataError
    from elip_models.training.errors import Stopped, TrainingError
    from elip_models.validation import ConfigError, is_missing_extra, require_extra
except ImportError as error:
    sys.stderr.write(f"elip needs the train extra: pip install 'elip-kernels[train]' ({error})\n")
    raise SystemExit(2) from None

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(train.train)
app.command()(finetune.finetune)
app.add_typer(evaluate.app, name="eval")
app.command()(inspect_model.visualize)
app.command()(inspect_model.profile)
app.command()(train.study)
app.command()(convert.convert)
app.add_typer(data.app, name="data")


@app.callback()
def elip() -> None:
    """Language-image pre-training with text-guided vision token reduction."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the console script `elip`; `arguments` default to those of the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be valid text
    try:
        with require_extra("this"):
            app(args=arguments, prog_name="elip")
    except ImportError as error:
        if not is_missing_extra(error):
            raise
        _exit_with(str(error))
    except Stopped as stopped:
        _exit_with(str(stopped), stopped.status)
    except (ConfigError, DataError, TrainingError) as error:
        _exit_with(str(error))
    except OSError as error:  # such as a full disk
        named = f"{error.filename!s:.300}: " if error.filename is not None else ""
        _exit_with(f"{named}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        words = "allocate memory", "out of memory"  # on a CPU, on a GPU
        if not isinstance(error, MemoryError) and not any(each in str(error) for each in words):
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
