"""Text reduction: the dropped tokens against a loop over texts, and CLIP's text tower with it."""

import pytest
import torch

from elip_models.reduction.text import STRATEGIES, TextReduction

LENGTHS = (13, 9, 5, 2, 1, 0)
L = 13


def texts(anchor="last", dtype=torch.float32):
    """tokens (6, 13, 4), a ragged mask, the anchor of each text, scores with ties and a NaN."""
    tokens = torch.randn(len(LENGTHS), L, 4, dtype=dtype)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(L) < lengths[:, None]
    mask[1] = mask[1].flip(0)  # padded on the left
    last = (mask * torch.arange(L)).amax(1)
    scores = torch.randint(0, 4, (len(LENGTHS), L)).float()
    scores[0, 3] = torch.nan
    return tokens, mask, last if anchor == "last" else mask.int().argmax(1), scores


def oracle(mask, anchor, key, drop):
    """Positions that stay, a list for each text; `key`, the higher the longer a token stays."""
    kept = []
    for row, place, values in zip(mask.tolist(), anchor.tolist(), key.tolist(), strict=True):
        real = [i for i in range(len(row)) if row[i] or i == place]
        others = [i for i in real if i != place]
        others.sort(key=lambda i, v=values: (v[i] != v[i], -v[i], i))
        kept.append(sorted([place, *others[: len(real) - int(drop * len(real)) - 1]]))
    return kept


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.4, 0.99])
@pytest.mark.parametrize("anchor", ["first", "last"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_drops_what_a_loop_over_texts_drops(strategy, anchor, drop):
    tokens, mask, places, scores = texts(anchor)
    torch.manual_seed(7)
    out = TextReduction(strategy, drop)(tokens, mask, places, scores)
    torch.manual_seed(7)
    by_position = -torch.arange(L).float().expand(mask.shape)
    key = {"random": torch.rand(mask.shape), "post": by_position, "learned": scores}[strategy]
    expected = oracle(mask, places, key, drop)
    assert out.tokens.shape == (len(LENGTHS), L - int(drop * L), 4)
    assert [row[m].tolist() for row, m in zip(out.kept, out.mask, strict=True)] == expected
    assert torch.equal(out.tokens, tokens.gather(1, out.kept[..., None].expand(-1, -1, 4)))
    assert torch.equal(out.kept.gather(1, out.anchor[:, None])[:, 0], places)


def test_each_text_drops_its_own_share_and_padding_displaces_nothing():
    tokens, mask, places, _ = texts()
    out = TextReduction("post")(tokens, mask, places)
    assert out.mask.sum(1).tolist() == [8, 6, 3, 2, 1, 1]
    assert out.kept[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 12]
    assert out.anchor.tolist() == [7, 5, 2, 1, 0, 0]


def test_an_int_is_the_anchor_of_every_text():
    tokens, mask, _, scores = texts()
    out = TextReduction("learned")(tokens, mask, 0, scores)
    expected = TextReduction("learned")(tokens, mask, torch.zeros(6, dtype=torch.int64), scores)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_gradients_reach_the_kept_tokens_only():
    tokens, mask, places, scores = texts(dtype=torch.float64)
    tokens.requires_grad_()
    scores.requires_grad_()
    out = TextReduction("learned")(tokens, mask, places, scores)
    weight = torch.randn_like(out.tokens)
    (out.tokens * weight).sum().backward()
    index = out.kept[..., None].expand_as(weight)
    assert torch.equal(tokens.grad, torch.zeros_like(tokens).scatter(1, index, weight))
    assert scores.grad is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_whole_for_any_length(strategy):
    torch._dynamo.reset()
    tokens, mask, places, scores = texts("first")
    reduction = TextReduction(strategy)
    compiled = torch.compile(reduction.__call__, fullgraph=True, backend="eager", dynamic=True)
    for length in (L, 11):
        arguments = tokens[:, :length], mask[:, :length], places.clamp(max=length - 1)
        torch.manual_seed(3)
        got = compiled(*arguments, scores[:, :length])
        torch.manual_seed(3)
        expected = reduction(*arguments, scores[:, :length])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


BAD = [
    ({"strategy": "first"}, {}, "strategy: expected one of random, post, learned, got 'first'"),
    ({"drop": 1.0}, {}, r"drop: expected a share in \[0, 1\), such as 0.4, got 1.0"),
    ({"drop": True}, {}, "drop: expected a share"),
    ({}, {"tokens": torch.zeros(6, 4)}, r"tokens: expected a tensor \(B, L, D\), got \(6, 4\)"),
    ({}, {"mask": torch.ones(6, 4, dtype=torch.bool)}, r"mask: expected .* = \(6, 13\)"),
    ({}, {"mask": torch.ones(6, 13)}, "mask: expected a bool tensor"),
    ({}, {"anchor": 13}, "anchor: expected a position from 0 to 12, got 13"),
    ({}, {"anchor": torch.zeros(5).long()}, r"anchor: expected .* \(B,\) = \(6,\)"),
    ({}, {"scores": None}, "scores: expected .* for strategy='learned', got None; elip_kernels"),
    ({}, {"scores": torch.zeros(6, 4)}, r"scores: expected \(B, L\) = \(6, 13\)"),
]


@pytest.mark.parametrize(("settings", "changed", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(settings, changed, message):
    names = ("tokens", "mask", "anchor", "scores")
    arguments = dict(zip(names, texts(), strict=True)) | changed
    with pytest.raises((TypeError, ValueError), match=message):
        TextReduction(**({"strategy": "learned"} | settings))(**arguments)
