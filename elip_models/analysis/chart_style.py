"""The style of SVG charts: readable on light and dark pages, reproducible byte by byte."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elip_models.saving.files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#808080"
GREYS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "elip",
    "savefig.transparent": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    **dict.fromkeys(GREYS, GREY),
}
METADATA = {"Date": None, "Creator": None}
"""Argument `metadata` of `savefig`."""


def write_figure(figure: "Figure", path: Path, **options: Any) -> None:
    """Write a figure completely or not at all, with options of `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], **options)
    written = content.getvalue()
    write_file(path, _with_numbered_clips(written) if path.suffix == ".svg" else written)


def _with_numbered_clips(svg: bytes) -> bytes:
    """Return a chart whose clip paths have numbers: hashes of coordinates differ by machine."""
    names = dict.fromkeys(re.findall(rb'<clipPath id="(p[0-9a-f]+)"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"clip%d" % number)
    return svg
