"""`benchmarks.redundant_patches` measures documents, and docs/vlm.py writes its table."""

import json
from pathlib import Path

import pytest

from benchmarks.redundant_patches import DOCUMENTS, TOLERANCES, main
from tests.helpers.scripts import load_script

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_every_document_is_measured(tmp_path):
    path = tmp_path / "dedup.json"
    main(["--smallest", "--rounds", "1", "--output", str(path)])
    measured = json.loads(path.read_text())
    assert measured["parity"]["passed"] and measured["commit"]
    assert list(measured["documents"]) == list(DOCUMENTS)
    names = [f"{tolerance:g}" for tolerance in TOLERANCES]
    for document in measured["documents"].values():
        for part in (document["removed"], document["cosine"], document["tower"]["ratios"]):
            assert list(part) == names
        assert 0 < document["removed"]["0"] <= document["removed"]["0.4"] < 1
    block = load_script(DOCS / "vlm.py").documents_block(measured)
    assert block.count("\n| text page, 962 tokens |") == len(TOLERANCES)
