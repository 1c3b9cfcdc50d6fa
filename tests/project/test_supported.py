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


@pytest.mark.slow
def test_a_stale_table_is_seen_and_rewritten(supported, tmp_path):
    page = tmp_path / "models.md"
    page.write_text("before\n<!-- supported:begin -->\nold\n<!-- supported:end -->\nafter\n")
    assert supported.main(["--check", "--page", str(page)]) == 1
    assert supported.main(["--page", str(page)]) == 0
    assert supported.main(["--check", "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| timm ViT (`vit_base_patch16_224`) | yes | yes |" in text
    page.write_text("no markers")
    assert supported.main(["--page", str(page)]) == 1
    assert page.read_text() == "no markers"
