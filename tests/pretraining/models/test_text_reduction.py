"""Text reduction: dropped tokens against a loop over texts, and BLIP and METER with it."""

from typing import get_args

import pytest
import torch

import elip_models
from elip_models.pretraining.models.layers.text_reduction import TextReduction, TextStrategy
from tests.helpers.cross_modal_cases import batch_of_four, draws, made

LENGTHS, L = (13, 9, 5, 2, 1, 0), 13
STRATEGIES = get_args(TextStrategy)
KEPT = (5, 5, 3, 2)  # of 8, 7, 4 and 3 real tokens in `batch_of_four`, of which 40% go
FAMILIES = ["blip", "meter"]


def texts():
    """Return tokens (6, 13, 4), a ragged mask, and scores with ties and a NaN."""
    tokens = torch.randn(len(LENGTHS), L, 4)
    mask = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
    mask[1] = mask[1].flip(0)  # padded on the left
    scores = torch.randint(0, 4, (len(LENGTHS), L)).float()
    scores[0, 3] = torch.nan
    return tokens, mask, scores


def oracle(mask, key, drop):
    """Return the remaining positions of each text; tokens with a small `key` are dropped first."""
    kept = []
    for row, values in zip(mask.tolist(), key.tolist(), strict=True):
        others = [i for i in range(1, len(row)) if row[i]]
        others.sort(key=lambda i, v=values: (v[i] != v[i], -v[i], i))
        real = 1 + len(others)
        kept.append([0, *sorted(others[: real - int(drop * real) - 1])])
    return kept


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.4, 0.99])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drops_what_a_loop_over_texts_drops(strategy, drop):
    tokens, mask, scores = texts()
    tokens.requires_grad_()
    torch.manual_seed(7)
    out = TextReduction(strategy, drop)(tokens, mask, scores)
    torch.manual_seed(7)
    by_position = -torch.arange(L).float().expand(mask.shape)
    key = {"random": torch.rand(mask.shape), "post": by_position, "learned": scores}[strategy]
    expected = oracle(mask, key, drop)
    assert out.tokens.shape == (len(LENGTHS), L - int(drop * L), 4)
    assert [row[m].tolist() for row, m in zip(out.kept, out.mask, strict=True)] == expected
    out.tokens[out.mask].sum().backward()  # a gradient of one for each kept token
    kept = torch.zeros_like(mask)
    for row, positions in enumerate(expected):
        kept[row, positions] = True
    assert torch.equal(tokens.grad, kept[..., None].expand_as(tokens).float())


def stacks():
    """Return layers of text towers of BLIP and METER, with the inputs of their cross attention."""
    blip, meter = (made(family, text_depth=3) for family in FAMILIES)
    image = torch.randn(4, 9, 16).double()
    return {
        "alone": (meter.text, {}),
        "with image": (blip.encoders.text, {"image_tokens": image}),
        "decoder": (blip.decoder, {"image_tokens": image, "causal": True}),
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stack", ["alone", "with image", "decoder"])
def test_layers_run_whole_and_then_on_the_kept_tokens(stack, strategy):
    tower, options = stacks()[stack]
    _, ids, mask = batch_of_four()
    hidden, cls = tower.embed(ids), torch.randn(4, 16).double()
    text = tower.run_reduced(hidden, mask, TextReduction(strategy), **options, image_cls=cls)
    assert text.mask.sum(1).tolist() == list(KEPT) and text.tokens.shape == (4, 5, 16)
    for row, n in enumerate(mask.sum(1)):
        own = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in options.items()}
        half = tower.run(hidden[row : row + 1, :n], mask[row : row + 1, :n], range(1), **own)
        kept = text.kept[row][text.mask[row]]
        assert kept[0] == 0 and (kept.diff() > 0).all()
        expected = tower.run(half[:, kept], mask[row : row + 1, kept], range(1, 3), **own)
        torch.testing.assert_close(text.tokens[row, : len(kept)], expected[0])
    whole = tower.run_reduced(hidden, mask, TextReduction("post", 0.0), **options)
    expected = tower.run(hidden, mask, **options)
    torch.testing.assert_close(whole.tokens[mask == 1], expected[mask == 1])


def test_learned_keeps_what_the_image_attends_to():
    tower, (_, ids, mask) = made("meter", text_depth=2).text, batch_of_four()
    hidden, cls = tower.embed(ids), torch.randn(4, 16).double()
    for image_cls in (cls, -cls):
        text = tower.run_reduced(hidden, mask, TextReduction("learned"), image_cls=image_cls)
        attention, half = tower.layers[1].attention.self, tower.run(hidden, mask, range(1))
        q = attention.query(image_cls).view(4, 2, 1, 8)
        k = attention.key(half).view(4, 8, 2, 8).transpose(1, 2)
        scores = (q @ k.mT * 8**-0.5).masked_fill(~(mask == 1)[:, None, None], -torch.inf)
        scores = scores.softmax(-1).mean(1)[:, 0]
        scores[:, 0] = torch.inf
        for row, n in enumerate(KEPT):
            assert torch.equal(text.kept[row, :n], scores[row].topk(n).indices.sort().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_encodes_the_dense_image_first(family):
    batch = batch_of_four()
    drawn, passes = draws(family, *batch, "local"), {}
    for strategy in STRATEGIES:
        model, seen = made(family, text_reduction=strategy, scorer="last"), []
        model.visual.blocks[0].register_forward_hook(lambda m, args, out, s=seen: s.append(out))
        model(*batch, drawn=drawn)
        passes[strategy] = [tokens.requires_grad for tokens in seen]
    online = [True] * (1 if family == "blip" else 2)
    assert passes["random"] == passes["post"] == online
    assert passes["learned"] == [grad for one in online for grad in (False, one)]


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="text_reduction: expected one of 'random'"):
        elip_models.create_model("blip_tiny", text_reduction="last")
    with pytest.raises(ValueError, match="text_drop: expected a number in"):
        elip_models.create_model("blip_tiny", text_reduction="post", text_drop=1.0)
    with pytest.raises(TypeError, match="text_reduction: expected None"):
        elip_models.create_model("blip_tiny", task="vqa", text_reduction="post")
