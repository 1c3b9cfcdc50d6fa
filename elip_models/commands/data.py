"""The command `elip data check`."""

import sys
from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

from elip_models.pretraining.tasks.tables import data_table
from elip_models.validation import as_config_error, check, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

if TYPE_CHECKING:
    from elip_models.pretraining.data import ExampleSource, SkipReport

app = typer.Typer(no_args_is_help=True, help="Check data.")

CheckedTask = Literal["vqa", "entailment", "nlvr2", "classification", "retrieval", "captioning"]
TASKS = "vqa, entailment, nlvr2, classification, retrieval or captioning"
LISTED = 20
"""Largest number of answers in the table."""

ImageSize = Annotated[int, typer.Option(min=1, max=4096, help="Side of built-in scenes in pixels.")]


@app.command("check")
def check_data(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC...",
            help="JSON list, tar shards, emoji_scenes:size=500, or https://host/shard.tar alone.",
        ),
    ],
    task: Annotated[str, typer.Option(help=f"Task of the data: {TASKS}.")] = "retrieval",
    limit: Annotated[
        int | None, typer.Option(min=1, max=sys.maxsize, help="Read at most so many samples.")
    ] = None,
    image_size: ImageSize = 224,
) -> None:
    """Read every sample of the sources; exit status 1 where some cannot be read."""
    from elip_models.pretraining.data import (
        check_source,
        is_stream,
        open_examples,
        open_source,
        open_stream,
    )
    from elip_models.pretraining.data.streams import redacted

    with as_config_error("TASK"):
        check("task", task, CheckedTask)
    has_captions = task in ("retrieval", "captioning")
    streams = has_captions and len(specs) == 1 and is_stream(specs[0])
    with as_config_error("SPEC", inner="spec"):
        if streams:
            source = open_stream(specs[0], samples=1)  # the check below counts the samples
        elif has_captions:
            source = open_source(specs, image_size=image_size)
        else:
            source = open_examples(task, specs, image_size=image_size)
    console, named = Console(), escape(", ".join(redacted(specs)))
    with console.status(f"reading {named}"):
        if streams:
            report, captions = source.check(limit)
        else:
            report = check_source(source, limit)
    if streams:
        console.print(data_table(named, report.seen, report, captions))
    elif has_captions:
        captions = [text for i in range(report.seen) for text in source.captions(i)]
        console.print(data_table(named, len(source), report, captions))
    else:
        console.print(_examples_table(named, source, report))
    if report.reasons:
        console.print(escape(report.summary()), soft_wrap=True)
        raise typer.Exit(1)


def _examples_table(name: str, source: "ExampleSource", report: "SkipReport") -> Table:
    examples = [source.text_alone(index) for index in range(report.seen)]
    words = [len(example.text.split()) for example in examples] or [0]
    right = Counter(answer for example in examples for answer in example.answers)
    listed = set(source.answers)
    table = Table(show_header=False)
    table.add_row("data", name)
    table.add_row("examples", f"{report.seen} of {len(source)} read")
    table.add_row("unreadable", f"{len(report.reasons)} ({report.share:.1%})")
    table.add_row("different texts", str(len({example.text for example in examples})))
    table.add_row("words per text", f"{fmean(words):.1f}, at most {max(words)}")
    table.add_row("answers to choose from", str(len(source.answers)))
    table.add_row("answers given", f"{right.total()}, {len(right)} different ones")
    table.add_row("not to choose", f"{sum(right[answer] for answer in right.keys() - listed)}")
    table.add_row("without an answer", f"{sum(not example.answers for example in examples)}")
    for answer, count in right.most_common(LISTED):
        table.add_row(f"  {escape(answer)}", f"{count} ({count / right.total():.1%})")
    if len(right) > LISTED:
        table.add_row("  ..", f"{len(right) - LISTED} more")
    return table
