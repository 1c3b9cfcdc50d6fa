"""The command `elip data check`."""

import sys
from collections import Counter
from collections.abc import Iterable
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

if TYPE_CHECKING:
    from elip_models.pretraining.data import ExampleSource

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Check data.")

CheckedTask = Literal["vqa", "entailment", "nlvr2", "classification", "retrieval", "captioning"]
LISTED = 20  # answers in the table


@app.command("check")
def check_data(
    specs: Annotated[
        list[str],
        typer.Argument(
            metavar="SPEC",
            help="JSON list, tar shards, emoji_scenes:size=500, or https://host/shard.tar alone.",
        ),
    ],
    task: Annotated[CheckedTask, typer.Option(help="Task of the data.")] = "retrieval",
    limit: Annotated[
        int | None, typer.Option(min=1, max=sys.maxsize, help="Read at most so many samples.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Side of built-in scenes in pixels.")
    ] = 224,
) -> None:
    """Read every sample; exit status 1 if one cannot be read."""
    from elip_models.pretraining.data import (
        check_source,
        is_stream,
        open_examples,
        open_source,
        open_stream,
    )
    from elip_models.pretraining.data.streams import redacted

    has_captions = task in ("retrieval", "captioning")
    streams = has_captions and len(specs) == 1 and is_stream(specs[0])
    with as_config_error("SPEC", inner="spec"):
        if streams:
            source = open_stream(f"{specs[0]},samples=1")  # the check below counts the samples
        elif has_captions:
            source = open_source(specs, image_size=image_size)
        else:
            source = open_examples(task, specs, image_size=image_size)
    console, captions = Console(), None
    name = ", ".join(redacted(specs))
    with console.status(f"reading {escape(name)}"):
        if streams:
            report, captions = source.check(limit)
        else:
            report = check_source(source, limit)
    if has_captions and captions is None:
        captions = [text for i in range(report.seen) for text in source.captions(i)]
    size = report.seen if streams else len(source)
    rows = {
        "data": name,
        "samples": f"{report.seen} of {size} read",
        "unreadable": f"{len(report.reasons)} ({report.share:.1%})",
    }
    if has_captions:
        rows["captions"] = f"{len(captions)}, {len(captions) / max(1, report.seen):.2f} per sample"
        rows |= {"words per caption": _words(captions)}
    else:
        rows |= _answers(source, report.seen)
    table = Table(show_header=False)
    for label, value in rows.items():
        table.add_row(escape(label), escape(value))
    console.print(table)
    if report.reasons:
        console.print(escape(report.summary()), soft_wrap=True)
        raise typer.Exit(1)


def _words(texts: Iterable[str]) -> str:
    words = [len(text.split()) for text in texts] or [0]
    return f"{fmean(words):.1f}, at most {max(words)}"


def _answers(source: "ExampleSource", count: int) -> dict[str, str]:
    """Return what the first `count` examples contain, by label of a table."""
    examples = [source.text_alone(index) for index in range(count)]
    right = Counter(answer for example in examples for answer in example.answers)
    common = [
        f"{answer} {number / right.total():.1%}" for answer, number in right.most_common(LISTED)
    ]
    return {
        "words per text": _words(example.text for example in examples),
        "answers to choose from": str(len(source.answers)),
        "answers given": f"{right.total()}, {len(right)} different ones",
        "most frequent": ", ".join(common),
        "not to choose": str(sum(right[answer] for answer in right.keys() - {*source.answers})),
    }
