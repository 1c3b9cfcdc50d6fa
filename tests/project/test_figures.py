"""No page has a measured figure that was typed by hand: scripts write them between two markers."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = re.compile(
    r"<!-- (\w+):begin -->.*?<!-- \1:end -->|^```.*?^```$|`[^`]*`|\]\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)
"""What has no figure typed by hand: generated blocks, code, and addresses."""
FIGURE = re.compile(
    r"[−+-]?\d+(?:\.\d+)?%|(?<![\w.])0\.\d+(?![\d.]*\d)|[−+]\d+\.\d+|\d[\d.]* (?:times|points|ms)\b"
)
SETTINGS = {"0.7", "70%", "0.5", "0.35", "0.25", "0.11", "95%", "80%", "5%", "0%", "100%"}
"""Rates, levels of confidence and power, and the ends of a scale."""
NOT_MEASURED = {
    "calibrate.md": ({"0.02", "0.95", "0.30", "0.05", "0.03", "0.97"}, "settings of calibrate"),
    "concepts.md": (
        {"90%", "65%", "40%", "0.8", "0.2", "0.97"},
        "the paper's schedule, fusion weights, the bound of no gain, a count of FLOPs",
    ),
    "paper.md": (
        {"90%", "85%", "65%", "55%", "50%", "40%", "0.5", "0.8"}
        | {"11%", "34%", "21%", "0.816", "0.901", "0.742", "5.6%", "41.9%"},
        "the paper's settings, and counts of `benchmarks.paper` beside its figures",
    ),
    "results.md": ({"0.71"}, "the length of an arm"),
    "serve.md": ({"0.32"}, "a version of vLLM"),
    "strategies.md": ({"30%", "40%"}, "options of strategies"),
    "training.md": ({"27 times"}, "a count of `tests.kills`"),
    "vlm.md": ({"0.97"}, "the bound of no gain"),
}
"""Figures by page that are typed by hand, and why."""
SECTIONS = {
    "training.md": (
        "## Larger models and images",  # test_docs.py compares it with the counts
        "## Sharded training",  # bytes, counted from the parameters
    ),
}
"""Sections that have other figures, by page."""
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if not page.name.endswith("-ops.md")
    and page.name not in ("timm_models.md", "language_models.md")
]


def figures(text):
    """Return the figures of a page outside of generated blocks, code and addresses."""
    return FIGURE.findall(GENERATED.sub(" ", text))


def without(text, heading):
    """Return a page without a section."""
    level = heading.split()[0]
    pattern = rf"^{heading}$.*?(?=^#{{1,{len(level)}}} |\Z)"
    found, count = re.subn(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    assert count == 1, heading
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_measured_figure_is_typed_by_hand(page):
    text = page.read_text(encoding="utf-8")
    for heading in SECTIONS.get(page.name, ()):
        text = without(text, heading)
    allowed, _ = NOT_MEASURED.get(page.name, (set(), ""))
    typed = [each for each in figures(text) if each not in SETTINGS | allowed]
    assert typed == [], "a script writes a measured figure; a setting goes to NOT_MEASURED"
    assert allowed <= set(figures(text)), "remove from NOT_MEASURED what the page does not have"


@pytest.mark.parametrize(
    "text", ["saves 31% of", "by −3.0 (−6.2 to 0.3)", "at 0.38.", "1.5 points"]
)
def test_a_measured_figure_is_found(text):
    assert figures(text) and not set(figures(text)) <= SETTINGS
    assert not figures(f"<!-- a:begin -->\n{text}\n<!-- a:end -->\n`{text}`\n```text\n{text}\n```")
