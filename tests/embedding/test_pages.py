"""`elip embed --pages` and `elip search`: pages of documents by late interaction."""

import json
import re

import pytest
from PIL import Image, ImageDraw
from sentence_transformers import MultiVectorEncoder

import elip_models
from elip_models.embedding import pages
from elip_models.validation import ConfigError
from tests.helpers.tiny_run import elip
from tests.vlm.test_sentence_transformers import max_similarities, saved_colpali

QUERY = "what is it"


def drawn(number):
    page = Image.new("RGB", (200, 260), "white")
    ImageDraw.Draw(page).rectangle((10, 20 * number, 150, 20 * number + 30), fill=(number, 0, 90))
    return page


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A model, and a folder of a PDF file of nine pages, an image, and a damaged PDF file."""
    folder = tmp_path_factory.mktemp("documents")
    saved_colpali(folder / "model")
    (folder / "files" / "b").mkdir(parents=True)
    first, *others = map(drawn, range(9))
    first.save(folder / "files" / "a.pdf", save_all=True, append_images=others)
    drawn(9).save(folder / "files" / "b" / "c.png")
    (folder / "files" / "damaged.pdf").write_bytes(b"%PDF")
    return folder


@pytest.mark.parametrize("keep", [None, 0.5])
def test_pages_are_found_by_their_largest_similarities(keep, documents, tmp_path):
    model, files = str(documents / "model"), documents / "files"
    result = pages.embed_pages(model, files, tmp_path, keep=keep)
    encoder = MultiVectorEncoder(model, device="cpu")
    (query,) = encoder.encode_query([QUERY])
    if keep is not None:
        elip_models.reduce_(encoder, keep=keep)
    every = [pages.Page("a.pdf", number) for number in range(1, 10)] + [pages.Page("b/c.png", 1)]
    images = [pages.page_image(tmp_path, pages.FoundPage(1, 0.0, *page)) for page in every]
    assert images[0].size > drawn(0).size and images[-1].size == drawn(9).size
    vectors = encoder.encode_document(images, batch_size=4)
    scores = {page: max_similarities(query, of) for page, of in zip(every, vectors, strict=True)}
    found = pages.search_pages(tmp_path, QUERY, top=20)
    assert sorted(page[2:] for page in found) == every
    for page in found:
        assert page.similarity == pytest.approx(scores[page[2:]], abs=1e-4)
    assert [page.rank for page in found] == list(range(1, 11))
    assert sorted(found, key=lambda page: -page.similarity) == list(found)
    assert (result.pages, result.vectors) == (10, sum(map(len, vectors)))
    assert list(result.skipped) == ["damaged.pdf"]


def test_a_second_run_embeds_what_is_new(documents, tmp_path, monkeypatch):
    model, files = str(documents / "model"), documents / "files"
    first = pages.embed_pages(model, files, tmp_path, keep=0.5)
    monkeypatch.setattr(MultiVectorEncoder, "encode_document", None)
    assert pages.embed_pages(model, files, tmp_path, keep=0.5) == first
    with pytest.raises(ConfigError, match=r"output: .*strategies"):
        pages.embed_pages(model, files, tmp_path, keep=0.25)


def test_commands_embed_search_and_show_pages(documents, tmp_path, capsys):
    index, found = tmp_path / "index", tmp_path / "found"
    options = "--pages", "--model", documents / "model", "--keep", 0.5, "--output", index
    assert elip("embed", documents / "files", *options) == 0
    printed = capsys.readouterr()
    assert "10 pages with" in printed.out and "skipped damaged.pdf: " in printed.err
    assert elip("search", index, QUERY, "--top", 2, "--json", "--pictures", found) == 0
    best, second = json.loads(capsys.readouterr().out)
    assert best["similarity"] >= second["similarity"]
    picture = Image.open(found / "01.png")
    page = pages.FoundPage(**best)
    assert picture.tobytes() == pages.page_image(index, page).tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "local"], "--ray: expected none with --pages"),
        (["--reduce", "divers"], "--reduce: .* did you mean 'diverse'"),
        (["--model", "./none"], "--model: "),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_a_mistake_is_named(options, message, documents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = {"--model": documents / "model", "--output": "index"} | dict([options])
    rest = [text for pair in known.items() for text in pair]
    assert elip("embed", documents / "files", "--pages", *rest) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
