"""The style of SVG charts: readable on light and dark pages, reproducible byte by byte."""

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
