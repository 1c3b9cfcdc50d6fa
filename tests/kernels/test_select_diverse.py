"""select_diverse and select_dpp against their definitions, by loops in fp64."""

import pytest
import torch
import torch.nn.functional as F

from elip_kernels import select_diverse, select_dpp

B, N, D = 3, 23, 16
SELECTIONS = [select_diverse, select_dpp]
by_step = {"selection_order": True}


def cosines(tokens):
    unit = F.normalize(tokens.double(), dim=-1)
    return unit @ unit.mT


def farthest(similarity, count, first=None):
    """Return the max-min selection of one image: each time try every token."""
    distance, everyone = 1 - similarity, range(len(similarity))
    if first is None:
        nearest = [min(distance[n, m].item() for m in everyone if m != n) for n in everyone]
        first = nearest.index(max(nearest))
    selected = [first]
    while len(selected) < count:
        left = [n for n in everyone if n not in selected]
        nearest = [min(distance[n, m].item() for m in selected) for n in left]
        selected.append(left[nearest.index(max(nearest))])
    return selected


def most_likely(kernel, count):
    """Return the greedy selection of one image by log-determinants of the kernel's minors."""
    selected = []
    while len(selected) < count:
        left = [n for n in range(len(kernel)) if n not in selected]
        minors = [kernel[[*selected, n]][:, [*selected, n]] for n in left]
        gains = [torch.linalg.slogdet(minor).logabsdet.item() for minor in minors]
        selected.append(left[gains.index(max(gains))])
    return selected


@pytest.mark.parametrize("count", [1, 2, 9, N])
def test_max_min_equals_its_definition(count):
    tokens, first = torch.randn(B, N, D), torch.randint(N, (B,))
    expected = [farthest(cosine, count) for cosine in cosines(tokens)]
    assert select_diverse(tokens, count, **by_step).tolist() == expected
    expected = [
        farthest(cosine, count, first[b].item()) for b, cosine in enumerate(cosines(tokens))
    ]
    assert select_diverse(tokens, count, first=first, **by_step).tolist() == expected


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e15])
@pytest.mark.parametrize("count", [1, 2, 9, D - 1])
def test_dpp_equals_greedy_log_determinants(count, scale):
    tokens, relevance = torch.randn(B, N, D), torch.rand(B, N) + 0.05
    relevance[:, 4] *= -1
    kernels = relevance[:, :, None].double() * cosines(tokens) * relevance[:, None].double()
    expected = [most_likely(kernel, count) for kernel in kernels]
    got = select_dpp(tokens, count, relevance=scale * relevance, **by_step)
    assert got.tolist() == expected


@pytest.mark.parametrize("select", SELECTIONS)
def test_counts_ratios_and_orders(select):
    tokens, mask = torch.randn(B, N, D), torch.rand(B, N) < 0.7
    steps = select(tokens, 11, **by_step)
    assert steps.dtype == torch.int64
    assert torch.equal(select(tokens, 11), steps.sort(1).values)
    assert torch.equal(select(tokens, 0.5), select(tokens, 11))
    for count in range(1, 11):
        assert torch.equal(select(tokens, count, **by_step), steps[:, :count])
    everything = select(tokens, N, mask=mask)
    for row, real in zip(everything, mask, strict=True):
        assert row.tolist() == [*real.nonzero()[:, 0].tolist(), *(~real).nonzero()[:, 0].tolist()]


@pytest.mark.parametrize("select", SELECTIONS)
def test_a_padded_image_selects_as_it_does_alone(select):
    tokens, mask = torch.randn(B, N, D), torch.rand(B, N) < 0.7
    noise = torch.tensor([torch.nan, torch.inf, 0.0, 1.0]).repeat(N)[:N, None]
    padded = torch.where(mask[..., None], tokens, noise)
    got = select(padded, N, mask=mask, **by_step)
    for b, real in enumerate(mask):
        places, count = real.nonzero()[:, 0], int(real.sum())
        alone = select(tokens[b : b + 1, real], count, **by_step)[0]
        assert torch.equal(got[b, :count], places[alone])
        assert torch.equal(got[b, count:], (~real).nonzero()[:, 0])  # the lowest index first


@pytest.mark.parametrize("select", SELECTIONS)
def test_an_image_without_real_tokens_selects_in_order(select):
    tokens, mask = torch.randn(2, N, D), torch.ones(2, N, dtype=torch.bool)
    mask[1] = False
    got = select(tokens, 5, mask=mask, **by_step)
    assert torch.equal(got[0], select(tokens, 5, **by_step)[0])
    assert got[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("select", SELECTIONS)
def test_ties_go_to_the_lower_index(select, dtype):
    corners = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    tokens = corners[[0, 0, 1, 0, 2, 1, 3, 2, 3]].to(dtype)[None]
    assert select(tokens, 9, **by_step).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7, 8]]


@pytest.mark.parametrize("select", SELECTIONS)
def test_rounding_does_not_select_between_equal_tokens(select):
    tokens, noise = torch.randn(B, N, 2 * N), 1e-6 * torch.randn(2, B, N, 2 * N)
    options = [{}, {}]
    if select is select_dpp:
        relevance = (torch.rand(B, N) + 0.05).repeat(1, 2)
        options = [{"relevance": relevance * (1 + 1e-6 * torch.rand(B, 2 * N))} for _ in range(2)]
    for many in (N, 2 * N):
        one, other = (
            select(
                torch.cat((tokens + noise[k], tokens + noise[1 - k]), 1),
                many,
                **by_step,
                **options[k],
            )
            for k in range(2)
        )
        assert torch.equal(one, other)
        assert set(one[:, :N].flatten().tolist()) == set(range(N))  # the lower index of two


@pytest.mark.parametrize("select", SELECTIONS)
def test_tokens_that_differ_more_than_rounding_are_no_tie(select):
    angle = torch.tensor([0.0, 0.1, 0.101])
    tokens = torch.stack((angle.cos(), angle.sin()), 1)[None]
    assert select(tokens, 2, **by_step).tolist() == [[0, 2]]


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, 1e-30])
@pytest.mark.parametrize("select", SELECTIONS)
def test_tokens_without_direction_come_last(select, value):
    tokens, mask = torch.randn(2, N, D), torch.ones(2, N, dtype=torch.bool)
    tokens[0, [0, 7, 8]], mask[0, 3] = value, False
    got = select(tokens, N, mask=mask, **by_step)
    if select is select_diverse:
        assert got[0, -4:].tolist() == [0, 7, 8, 3]
    else:  # after D tokens, all others are combinations of them as well
        assert got[0, D:].tolist() == [*sorted(got[0, D:-1].tolist()), 3]
        assert {0, 7, 8} < set(got[0, D:].tolist())
    others = [n for n in range(N) if n not in (0, 3, 7, 8)]
    alone = select(tokens[:1, others], D, **by_step)[0]
    assert got[0, :D].tolist() == [others[n] for n in alone]
