"""The output opens in each library as docs/embed.md shows, where the library is installed."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import elip_models
from tests.embedding.conftest import SMALL
from tests.helpers.tiny_run import own_process

PAGE = Path(__file__).parents[2] / "docs" / "embed.md"
READERS = dict(
    re.findall(r"^### (\w+)\n+```py\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
)


def test_the_page_has_a_block_for_each_library():
    assert list(READERS) == ["pyarrow", "DuckDB", "polars", "datasets", "FAISS", "LanceDB"]


@pytest.mark.parametrize("library", READERS)
def test_the_block_of_a_library_reads_the_output(library, pictures, model, tmp_path, monkeypatch):
    code = READERS[library]
    if find_spec(library.lower()) is None:
        pytest.skip(f"{library} is not installed; the tests need it for this block alone")
    with own_process():
        elip_models.embed(model, pictures, tmp_path / "embeddings", **SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = {}
    exec(compile(code, library, "exec"), names)
    if "vectors" in names:
        assert names["vectors"].shape == (9, 64)
    if "index" in names:
        assert names["index"].ntotal == 9
    if "rows" in names:
        assert len(names["rows"]) == 9 and len(names["rows"][0][1]) == 64
    if "found" in names:
        assert len(names["found"]) == 5
