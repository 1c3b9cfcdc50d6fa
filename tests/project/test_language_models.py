"""docs/language_models.md agrees with the code, and its checks with the tests."""

from importlib import import_module
from pathlib import Path

import pytest
import transformers

from elip_models.vlm.families import FAMILIES
from elip_models.vlm.unsupported import language_support
from tests.helpers.scripts import load_script
from tests.vlm.checks import CHECKS, GAPS

DOCS = Path(__file__).parents[2] / "docs"
models = load_script(DOCS / "language_models.py")
PAGE = models.PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(
    f"transformers {transformers.__version__}." not in PAGE,
    reason="the page was written with another release of transformers",
)
def test_the_page_is_what_the_code_answers():
    assert models.page() == PAGE


def test_each_check_is_a_test_and_each_gap_is_of_a_check_and_a_family():
    for file, test in CHECKS.values():
        assert hasattr(import_module(f"tests.vlm.test_{file}"), f"test_{test}")
    for check, family in GAPS:
        assert check in CHECKS and family in FAMILIES


def test_every_type_of_transformers_is_supported_or_has_a_reason():
    support = language_support()
    assert {name for name, reason in support.items() if reason is None} == set(FAMILIES)
    assert all(reason is None or reason.startswith("it ") for reason in support.values())
