"""The generated block of a page, between two markers that stay."""

import re
import sys
from pathlib import Path

from elip_models.saving.files import write_file


def rewrite(page: Path, begin: str, end: str, block: str, *, command: str, check: bool) -> int:
    """Write `block` between the markers of a page; return the exit status.

    Args:
        page: a Markdown file.
        begin, end: the markers.
        block: the text between them.
        command: what a user runs to rewrite the page, for the message.
        check: write nothing.

    Returns:
        1 if the page has no markers or, with `check`, if it is stale; otherwise 0.
    """
    current = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
    if not pattern.search(current):
        sys.stderr.write(f"{page}: expected {begin} and {end} in it, got neither\n")
        return 1
    wanted = pattern.sub(lambda _: f"{begin}\n\n{block}\n\n{end}", current, count=1)
    if check and wanted != current:
        sys.stderr.write(f"{page} is stale: run {command}\n")
        return 1
    if wanted != current:
        write_file(page, wanted.encode())
    return 0
