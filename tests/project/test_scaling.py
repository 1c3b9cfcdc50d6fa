"""docs/scaling.py: the cost of a billion images, from a measured rate to tables of the page."""

import json
import re

import pytest

from tests.project.test_docs import script

MODULE = script("scaling")
MEASURED = {
    "machine": {"device": "a machine"},
    "photographs": 8000,
    "dense": {"images_per_second": 10.0, "bare_images_per_second": 12.5},
    "reduced": {
        "strategy": "tome",
        "keep": 0.7,
        "images_per_second": 12.5,
        "bare_images_per_second": 12.5,
        "cosine": {"mean": 0.9961, "low": 0.99, "high": 1.0},
        "neighbours": 0.78,
        "recall_at_10": {"mean": 0.768, "low": 0.7, "high": 0.8},
    },
}


@pytest.fixture
def written(tmp_path):
    """Arguments of the script for a page without tables, and results."""
    results, page = tmp_path / "collection.json", tmp_path / "scaling.md"
    results.write_text(json.dumps(MEASURED))
    page.write_text(f"before\n{MODULE.BEGIN}\n{MODULE.END}\nafter\n")
    return ["--results", str(results), "--page", str(page)], page


def cells(text):
    """Cells of each row of the tables, without the lines under the headers."""
    rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[each.strip() for each in row.split("|")] for row in rows if "---" not in row]


def test_the_page_has_time_and_cost_of_the_measured_rate(written):
    arguments, page = written
    assert MODULE.main([*arguments, "--check"]) == 1
    assert MODULE.main([*arguments, "--price", "0.5"]) == 0
    assert MODULE.main([*arguments, "--check", "--price", "0.5"]) == 0
    text = page.read_text()
    cost, dense, reduced, days, *rows = cells(text)
    assert cost[3] == "cost at $0.50 per hour"
    assert dense == ["dense", "10.0", "28,000", "$14,000", "1.00"]
    assert reduced == ["`tome`, keep 0.7", "12.5", "22,000", "$11,000", "0.80"]
    assert days == ["machines or GPUs", "dense", "`tome`, keep 0.7"]
    assert rows[0] == ["1", "1,200 days", "930 days"]
    assert rows[-1] == ["512", "2.3 days", "1.8 days"]
    assert "80% (dense) and 100% (`tome`, keep 0.7)" in text and "77% of the [neighbours" in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_a_reader_passes_rates_and_a_price(capsys):
    rates = ["--images-per-second", "1000", "--reduced", "1250", "--price", "2"]
    assert MODULE.main(rates) == 0
    _, dense, reduced, _, one, *_ = cells(capsys.readouterr().out)
    assert dense == ["dense", "1,000.0", "280", "$560", "1.00"]
    assert reduced == ["reduced", "1,250.0", "220", "$440", "0.80"]
    assert one == ["1", "12 days", "9.3 days"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reduced", "5"], "--reduced: expected --images-per-second too"),
        (["--images-per-second", "0"], "expected a number above 0, got 0"),
        (["--price", "inf"], "expected a number above 0, got inf"),
        (["--results", "no/such.json"], "--images-per-second of your own"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as status:
        MODULE.main(arguments)
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_the_tables_of_the_page_are_up_to_date():
    assert MODULE.main(["--check"]) == 0
