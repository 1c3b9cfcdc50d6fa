"""scorer='momentum': scores of the dense momentum tower select tokens of the online tower."""

import pytest
import torch

from elip_models.reduction.encode import run_tower
from elip_models.reduction.momentum_scores import forward_with_scores
from tests.helpers.cross_modal_cases import batch_of_four, draws, made, step
from tests.helpers.towers import assert_equal_gradients

DEEP = {"vision_depth": 6, "schedule": "2(100%) 3(60%) 1(30%)"}
FAMILIES = pytest.mark.parametrize("family", ["albef", "blip"])


def both(family, fusion, **options):
    """Return the infos of 'momentum' and 'exact' for the same images, with equal towers."""
    model = made(family, **(DEEP | options), fusion=fusion, scorer="momentum").eval()
    images, ids, mask = batch_of_four()
    text_cls = model.encode_text(ids, mask)[:, 0].detach()
    tokens, rows = forward_with_scores(model.tower_m, images, text_cls, model.reduction)
    dense, _ = run_tower(model.tower_m, images, None, model.dense)
    assert torch.equal(tokens, dense)
    _, by_rows = run_tower(model.tower, images, text_cls, model.reduction, rows=rows)
    _, by_exact = run_tower(model.tower, images, text_cls, model.reduction)
    return by_rows, by_exact


@FAMILIES
@pytest.mark.parametrize("fusion", [1.0, 0.8])
def test_with_equal_weights_the_first_stage_is_that_of_exact(family, fusion):
    by_rows, by_exact = both(family, fusion)
    assert torch.equal(by_rows[0].reduction.kept, by_exact[0].reduction.kept)
    if fusion == 1.0:  # else a text's share in CLS moves the patches of exact, and not these
        row, exact = by_rows[0].attention, by_exact[0].attention
        torch.testing.assert_close(row, exact, rtol=1e-9, atol=1e-12)


def test_a_token_merged_by_nearest_has_the_scores_of_all_it_holds():
    model = made("blip", **DEEP, scorer="momentum", merge="nearest").eval()
    images, ids, mask = batch_of_four()
    text_cls = model.encode_text(ids, mask)[:, 0].detach()
    _, rows = forward_with_scores(model.tower_m, images, text_cls, model.reduction)
    _, infos = run_tower(model.tower, images, text_cls, model.reduction, rows=rows)
    held = infos[0].reduction.source_map().to(rows[5].dtype)
    torch.testing.assert_close(infos[1].attention, (held @ rows[5][..., None])[..., 0])
    assert (held.sum(2) > 1).any()


@FAMILIES
def test_a_step_scores_nothing_and_trains(family, monkeypatch):
    torch.manual_seed(0)
    model, batch = made(family, **DEEP, scorer="momentum").train(), batch_of_four()
    drawn = draws(family, *batch, gather="local")
    monkeypatch.setattr("elip_models.reduction.strategies.elip.ELIP.score", None)
    losses, grads = step(model, batch, drawn)
    assert torch.isfinite(losses).all()
    assert all(
        g.abs().sum() > 0 for n, g in grads.items() if "visual.blocks" in n and "weight" in n
    )


@FAMILIES
def test_checkpointing_does_not_change_gradients(family):
    batch, steps = batch_of_four(), []
    drawn = draws(family, *batch, gather="local")
    for enable in (False, True):
        torch.manual_seed(3)
        model = made(family, **DEEP, scorer="momentum").train()
        model.set_grad_checkpointing(enable)
        steps.append(step(model, batch, drawn)[1])
    assert_equal_gradients(*steps, rtol=1e-9, atol=1e-12)


def test_without_the_momentum_tower_it_is_exact():
    model = made("blip", **DEEP, scorer="momentum").eval()
    assert model.reduction.scorer == "exact"
    with pytest.raises(ValueError, match="momentum_reduction: expected 'none' with"):
        made("blip", scorer="momentum", momentum_reduction="shared")
