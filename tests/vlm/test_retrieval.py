"""ColPali and ColQwen2, which make an embedding of each token, with fewer image tokens."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers

from elip_models import record_stages, reduce_, unreduce_
from elip_models.vlm.retrieval import RETRIEVAL as TYPES
from elip_models.vlm.strategies.dedup import Dedup
from tests.vlm import oracle
from tests.vlm.configs import RETRIEVAL, retrieval_model
from tests.vlm.models import build, prompt
from tests.vlm.test_dedup import WHITE, unattended

CASES = [
    *((name, strategy) for name in RETRIEVAL for strategy in ("diverse", "fastv:layer=1")),
    ("colpali", "visionzip"),
    ("colqwen2", "dedup:tolerance=0"),
]
parametrize = pytest.mark.parametrize(("name", "strategy"), CASES)


def made(name):
    """Return a retrieval model and a batch of two pages, one of which is padded."""
    inner, inputs = build(
        RETRIEVAL[name][-1], rows=((3, "image", 2), (4, "image", 5), (2, "image", 2))
    )
    model = retrieval_model(name).eval().double()
    model.vlm.load_state_dict(inner.model.state_dict())
    inputs = {key: inputs[key] for key in inputs if not key.endswith("type_ids")}
    if name == "colqwen2":  # its processor pads the patches of each page
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        pages = inputs["pixel_values"].split(sizes)
        for page in pages:
            page.view(-1, 4, page.shape[1])[::3] = WHITE
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True)
    return model, inputs


def test_every_model_has_a_case():
    assert set(RETRIEVAL) == set(TYPES)


@torch.no_grad()
@parametrize
def test_embeddings_are_those_of_the_model_without_removed_columns(name, strategy):
    model, inputs = made(name)
    dense = model(**inputs).embeddings
    reduce_(model, strategy)
    with record_stages(model) as infos:
        embeddings = model(**inputs).embeddings
    kept = (infos[0].kept, *infos[0].kept_behind)[-1]
    removed = unreduce_(model) and ~kept
    assert removed.any(1).all() and not embeddings[removed].any()
    assert torch.equal(model(**inputs).embeddings, dense)
    if strategy.startswith(("fastv", "visionzip")):  # not those of hidden columns
        assert not torch.equal(embeddings, dense)
        return
    is_dedup = strategy.startswith("dedup")
    with unattended(model, Dedup(0.0)) if is_dedup else nullcontext(), oracle.hidden(model, kept):
        expected = model(**inputs).embeddings
    read = kept & inputs["attention_mask"].bool()
    assert oracle.close(embeddings[read], expected[read])
    assert (dense - expected)[read].abs().max() > 1e-3
    assert torch.allclose(embeddings[read].norm(dim=-1), torch.ones(int(read.sum())).double())


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVAL)
def test_queries_are_untouched_and_late_interaction_reads_the_kept_tokens(name):
    model, inputs = made(name)
    query = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    expected = model(**query).embeddings
    reduce_(model, "diverse", keep=0.5)
    embeddings = model(**query).embeddings
    assert torch.equal(embeddings, expected)
    with record_stages(model) as infos:
        pages = model(**inputs).embeddings
    scores = (embeddings @ pages.mT).amax(2).sum(1)
    read = infos[0].kept & inputs["attention_mask"].bool()
    for page, score, real in zip(pages, scores, read, strict=True):
        assert torch.isclose((embeddings[0] @ page[real].mT).amax(1).clamp(min=0).sum(), score)


@torch.no_grad()
@pytest.mark.parametrize("name", RETRIEVAL)
def test_scores_without_rows_of_zeros_are_those_of_the_remaining_tokens(name):
    model, inputs = made(name)
    inputs = {key: value[:1] for key, value in inputs.items()}
    inputs |= prompt(model.vlm, inputs, ((3, "image", 2),))
    reduce_(model, "diverse", keep=0.5)
    page = model(**inputs).embeddings[0]
    rows = page[page.any(-1)]
    query = -rows.mean(0).expand(1, 2, -1)  # whose similarity with each token is negative
    score = partial(transformers.ColPaliProcessor.score_retrieval, None, query, output_dtype=None)
    assert (rows @ query[0].T).max() < 0
    assert score([page]) == 0
    assert torch.isclose(score([rows])[0, 0], (rows @ query[0].T).amax(0).sum())


@pytest.mark.parametrize("name", RETRIEVAL)
def test_training_reads_the_kept_tokens(name):
    model, inputs = made(name)
    reduce_(model, "diverse", keep=0.5)
    model(**inputs).embeddings.square().sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
