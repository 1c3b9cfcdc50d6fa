"""docs/transformers_models.md agrees with the code."""

from pathlib import Path

import pytest
import transformers

from tests.helpers.scripts import load_script
from tests.helpers.tiers import slow_except

DOCS = Path(__file__).parents[2] / "docs"


models = load_script(DOCS / "transformers_models.py")
PAGE = models.PAGE.read_text(encoding="utf-8")
ANSWERS = models.read(PAGE)
QUICK = ("DINOv3ViTModel", "BeitModel")
SLOW = ("Aimv2VisionModel", "DeiTModel", "Llama4VisionModel", "SwiftFormerModel", "VJEPA2Model")
pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__}:" not in PAGE,
    reason="the page was written with another release of transformers",
)


@pytest.mark.parametrize(
    "name",
    slow_except(QUICK, (*QUICK, *SLOW)),
)
def test_the_page_is_what_the_code_answers(name):
    if not ANSWERS[name].startswith("not built"):
        assert models.answer(name) == ANSWERS[name]


def test_the_page_has_every_name_and_its_count():
    assert list(ANSWERS) == models.names()
    assert models.read(models.page(ANSWERS)) == ANSWERS
    taken = sum(each.startswith("yes") for each in ANSWERS.values())
    assert taken >= 25 and f" {taken} of {len(ANSWERS)} can be reduced" in PAGE
