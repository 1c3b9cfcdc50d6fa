"""FLOPs of the paper's models, beside those of its Tables 1 and 5: `python -m benchmarks.paper`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.paper_flops import paper_report
from benchmarks.paper_table1 import table1_report
from elip_models.cli import run_command
from elip_models.saving.files import write_json
from elip_models.validation import check_output


def paper(
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Count the FLOPs of the paper's models, and compare them to the paper's figures."""
    check_output("--output", output)
    table5, figures5 = paper_report()
    table1, figures1 = table1_report()
    Console().print(table1, table5, sep="\n\n")
    if output is not None:
        write_json(output, {"paper": figures5, "paper_table1": figures1})


if __name__ == "__main__":
    run_command(paper, name="python -m benchmarks.paper")
