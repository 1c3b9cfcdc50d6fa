"""The table of supported models in docs/models.md is what the code answers now."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "supported.py"


@pytest.fixture(scope="module")
def supported():
    spec = spec_from_file_location("supported", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.block()
    module.block = lambda: text  # models are built once
    return module


@pytest.mark.slow
def test_the_page_is_up_to_date(supported):
    assert supported.main(["--check"]) == 0
