"""The kernels of select_diverse and select_dpp in the interpreter, against PyTorch in fp64."""

from itertools import cycle
from unittest.mock import patch

import pytest
import torch

import elip_kernels
from elip_kernels import select_diverse, select_dpp
from elip_kernels._operator import OPERATORS
from elip_kernels.ops.select_dpp import SPANNED

SELECTIONS = [select_diverse, select_dpp]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, N, D, K: full tiles, one more than that, one token, all tokens, a wide image
SHAPES = [(2, 64, 48, 5), (1, 33, 17, 33), (3, 1, 5, 1), (1, 18, 40, 2), (1, 100, 20, 12)]
CLOSE = 1e-4  # gains of which rounding may swap two


def by_kernels(select, tokens, keep, **options):
    """Return the result of the kernels; raise if the PyTorch implementation runs."""
    never = AssertionError("the PyTorch implementation ran")
    with patch.object(OPERATORS[select.__name__], "reference", side_effect=never):
        return select(tokens, keep, **options)


def options_of(select, B, N, share):
    """Return a mask, and the relevance or the first tokens of a selection."""
    relevance, first = torch.rand(B, N) + 0.05, torch.randint(N, (B,))
    more = {"first": first} if select is select_diverse else {"relevance": relevance}
    return {"mask": torch.rand(B, N) < share} | more


def gaps(select, tokens, order, options):
    """Return how far each selected token is from the best one of its step in fp64, at least 0."""
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    similarity, far = unit @ unit.mT, torch.zeros(order.shape, dtype=torch.float64)
    for b, steps in enumerate(order.tolist()):
        by_step = gains(select, similarity[b], steps, {n: v[b] for n, v in options.items()})
        for t, (step, gain) in enumerate(zip(steps, by_step, strict=True)):
            far[b, t] = gain.max() - gain[step]
    return far


def gains(select, similarity, steps, options):
    """Return the gains of all tokens before each step; -inf for tokens that were selected."""
    N, gains = len(similarity), []
    weight, factor = options.get("relevance", torch.ones(N)).double().abs(), []
    rest, real = torch.ones(N, dtype=torch.float64), options.get("mask", torch.ones(N) > 0)
    for t, step in enumerate(steps):
        if select is select_dpp:
            gain = torch.where(rest > SPANNED.value, weight * rest.clamp(min=0).sqrt(), 0.0)
        elif t == 0:
            other = similarity.masked_fill(torch.eye(N, dtype=torch.bool) | ~real, -2.0)
            gain = -other.amax(1)
        else:
            known = [n for n in steps[:t] if real[n]]
            gain = -similarity[:, known].amax(1) if known else torch.full((N,), 2.0).double()
        gain = gain.masked_fill(~real, -3.0)
        gain[steps[:t]] = -torch.inf
        gains.append(gain)
        if real[step] and rest[step] > SPANNED.value:
            column = similarity[step] - sum(c * c[step] for c in factor)
            factor.append(column / rest[step].sqrt())
            rest = rest - factor[-1].square()
    return gains


def check(select, tokens, keep, **options):
    """Check that each step selects a token with the largest gain in fp64, up to rounding."""
    order = by_kernels(select, tokens, keep, selection_order=True, **options)
    assert all(len(set(row)) == keep for row in order.tolist())
    has_first = "first" in options
    assert gaps(select, tokens, order, options)[:, has_first:].le(CLOSE).all()
    assert not has_first or torch.equal(order[:, 0], options["first"])
    ascending = by_kernels(select, tokens, keep, **options)
    assert torch.equal(ascending.sort(1).values, order.sort(1).values)
    return order


@pytest.mark.parametrize("share", [None, 0.6])
@pytest.mark.parametrize(("shape", "dtype"), zip(SHAPES, cycle(DTYPES), strict=False), ids=str)
@pytest.mark.parametrize("select", SELECTIONS)
def test_agrees_with_fp64(launches, poisoned_memory, select, shape, dtype, share):
    B, N, D, K = shape
    tokens = torch.randn(B, N, D).to(dtype)
    before = launches[f"elip::{select.__name__}"]
    check(select, tokens, K)
    if share is not None:
        check(select, tokens, K, **options_of(select, B, N, share))
    assert launches[f"elip::{select.__name__}"] == before + (2 if share is None else 4)


@pytest.mark.parametrize("select", SELECTIONS)
def test_selects_as_pytorch_where_products_are_exact(launches, select):
    """Corners of a cube have many ties; their products are integers."""
    tokens = torch.randint(2, (2, 40, 4)).float() * 2 - 1
    options = options_of(select, 2, 40, 0.8)
    if select is select_dpp:
        options["relevance"] = options["relevance"].mul(4).round()
    for masks in ({}, options):
        got = by_kernels(select, tokens, 24, selection_order=True, **masks)
        wide = {n: v.double() if v.is_floating_point() else v for n, v in masks.items()}
        exact = select(tokens.double(), 24, selection_order=True, **wide)
        assert torch.equal(got, exact)


@pytest.mark.parametrize("select", SELECTIONS)
def test_rounding_does_not_select_between_equal_tokens(launches, select):
    tokens, noise = torch.randn(2, 20, 40), 1e-6 * torch.randn(2, 2, 20, 40)
    for k in range(2):
        twice = torch.cat((tokens + noise[k], tokens + noise[1 - k]), 1)
        got = by_kernels(select, twice, 40, selection_order=True)
        assert torch.equal(got, select(twice.double(), 40, selection_order=True))
        assert got[:, :20].lt(20).all() and got[:, 20:].diff().eq(1).all()


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("select", SELECTIONS)
def test_tokens_without_direction_follow_the_reference(launches, select, value):
    tokens, options = torch.randn(2, 24, 48), options_of(select, 2, 24, 0.7)
    tokens[0, [0, 7, 8]] = value
    if select is select_dpp:
        options["relevance"][1, 2:6] = torch.tensor([torch.nan, 0.0, torch.inf, -1.0])
    for masks in ({}, options):
        got = by_kernels(select, tokens, 24, selection_order=True, **masks)
        exact = select(tokens.double(), 24, selection_order=True, **masks)
        assert torch.equal(got, exact)


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_position_beyond_the_image_reads_nothing_beyond_it(launches, select):
    tokens = torch.randn(2, 20, 8)
    if select is select_diverse:
        with patch.object(elip_kernels.ops.select_diverse, "check_range"):
            got = by_kernels(
                select, tokens, 5, first=torch.tensor([-7, 2**40]), selection_order=True
            )
        assert got[:, 0].tolist() == [0, 19]
    assert by_kernels(select, tokens, 20).tolist() == [list(range(20))] * 2
