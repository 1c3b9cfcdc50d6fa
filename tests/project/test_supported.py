"""The table of supported models in docs/models.md is what the code answers now."""

from pathlib import Path

import pytest

from tests.helpers.scripts import load_script

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert load_script(DOCS / "supported.py").main(["--check"]) == 0
