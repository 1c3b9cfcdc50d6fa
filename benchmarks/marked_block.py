"""The generated blocks of pages, each between two markers that stay, and the command for them."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from elip_models.saving.files import write_file


class Block(NamedTuple):
    """A generated part of a page.

    page: a Markdown file.
    name: of the markers `<!-- name:begin -->` and `<!-- name:end -->`.
    text: what stands between them.
    """

    page: Path
    name: str
    text: str


def rewrite(block: Block, *, command: str, check: bool) -> int:
    """Write a block into its page, or with `check` only compare it; return the exit status.

    The status is 1 if the page has no markers or, with `check`, if it is stale. `command` is what a
    user runs to rewrite the page, for the message.
    """
    begin, end = (f"<!-- {block.name}:{side} -->" for side in ("begin", "end"))
    current = block.page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(current):
        sys.stderr.write(f"{block.page}: expected {begin} and {end} in it, got neither\n")
        return 1
    wanted = pattern.sub(lambda _: f"{begin}\n\n{block.text}\n\n{end}", current, count=1)
    if check and wanted != current:
        sys.stderr.write(f"{block.page} is stale: run {command}\n")
        return 1
    if wanted != current:
        write_file(block.page, wanted.encode())
    return 0


def run(
    blocks: Callable[[], Iterable[Block]],
    command: str,
    description: str | None,
    arguments: list[str] | None,
) -> int:
    """Run a command that rewrites blocks, or compares them with `--check`; return the status."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    return max(rewrite(block, command=command, check=options.check) for block in blocks())
