"""Page retrieval by colpali-engine, with the lines that its users write."""

import pytest
import torch

import elip_models
from tests.vlm.configs import CONFIGS
from tests.vlm.models import build
from tests.vlm.test_sentence_transformers import (
    QUERIES,
    drawn_pages,
    image_processor,
    letters_tokenizer,
    max_similarities,
)

colpali = pytest.importorskip("colpali_engine.models", reason="colpali-engine is not installed")
pytestmark = pytest.mark.slow

ENGINE = {
    "ColPali": "paligemma",
    "ColQwen2": "qwen2_vl",
    "ColQwen2_5": "qwen2_5_vl",
    "ColIdefics3": "idefics3",
}
"""A class of colpali-engine, and the family of its language model."""


@pytest.fixture(params=ENGINE)
def engine(request):
    """Return a model of colpali-engine in fp64, and a batch of three pages."""
    torch.manual_seed(0)
    family = ENGINE[request.param]
    inner, inputs = build(family, rows=((3, "image", 2), (4, "image", 1), (2, "image", 3)))
    model = getattr(colpali, request.param)(inner.config).eval().double()
    if "qwen" in family:  # its processor pads the patches of each page
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        pages = inputs["pixel_values"].split(sizes)
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    return model, inputs


@torch.no_grad()
def test_removed_vectors_are_the_padding_of_colpali_engine(engine):
    model, inputs = engine
    dense = model(**dict(inputs))
    elip_models.reduce_(model, "diverse", keep=0.5)
    with elip_models.record_stages(model) as infos:
        pages = model(**dict(inputs))
    real = inputs["attention_mask"].bool()
    kept = infos[0].kept & real
    assert (~infos[0].kept).any(1).all() and pages.shape == dense.shape
    assert not pages[real & ~kept].any()
    torch.testing.assert_close(pages[kept].norm(dim=-1), torch.ones(int(kept.sum())).double())
    query = torch.nn.functional.normalize(pages[kept][:4] + 0.1, dim=-1)
    rows = [page[of_page] for page, of_page in zip(pages, kept, strict=True)]
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

    score = BaseVisualRetrieverProcessor.score_multi_vector
    (scores,) = score([query], rows, device="cpu").double()
    expected = [max_similarities(query, page) for page in rows]
    torch.testing.assert_close(scores, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    elip_models.unreduce_(model)
    assert torch.equal(model(**dict(inputs))[kept], dense[kept])


@torch.no_grad()
@pytest.mark.parametrize("keep", [None, 0.5])
def test_ten_pages_have_the_scores_of_the_remaining_vectors(keep):
    torch.manual_seed(0)
    config = CONFIGS["paligemma"]()
    config.text_config.vocab_size = 2048  # the processor adds tokens of places
    model = colpali.ColPali(config).eval()
    processor = colpali.ColPaliProcessor(image_processor(config), letters_tokenizer(config))
    if keep is not None:
        elip_models.reduce_(model, keep=keep)
    batches = [processor.process_images(drawn_pages()[first : first + 5]) for first in (0, 5)]
    pages = [page for batch in batches for page in model(**batch).unbind()]
    queries = list(model(**processor.process_queries(QUERIES)).unbind())
    vectors = [page[page.any(-1)] for page in pages]
    patches = image_processor(config).image_seq_length
    removed = 0 if keep is None else patches // 2
    assert [len(page) - len(of) for page, of in zip(pages, vectors, strict=True)] == [removed] * 10
    scores = processor.score(queries, vectors, device="cpu")
    expected = [[max_similarities(query, page) for page in vectors] for query in queries]
    torch.testing.assert_close(scores, torch.tensor(expected))
