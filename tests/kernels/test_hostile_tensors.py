"""Tensors that are not dense, infos made by hand, and values that no model makes."""

import math

import pytest
import torch

import elip_kernels
from elip_kernels import ReductionInfo
from tests.helpers.argument_cases import TABLE, B, D, N

KERNELS = [f for f in TABLE if f.__module__.startswith("elip_kernels") and TABLE[f][1]]
NOT_DENSE = {
    "sparse": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "mkldnn": torch.Tensor.to_mkldnn,
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}


def tensors_of(arguments):
    """The tensors among the arguments, the optional ones included."""
    more = {"mask": torch.ones(B, N).bool(), "size": torch.ones(B, N), "text": torch.ones(B, D)}
    required = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
    return required, more | {"penalty": torch.ones(B, N), "scored": torch.ones(B, N, D)}


@pytest.mark.filterwarnings("ignore")  # of torch, about what is a prototype
@pytest.mark.parametrize("form", NOT_DENSE)
@pytest.mark.parametrize("function", KERNELS, ids=lambda f: f.__name__)
def test_a_tensor_that_is_not_dense_is_refused_by_name(function, form):
    good, table = TABLE[function]
    required, more = tensors_of(good())
    tried = 0
    for name, tensor in (required | {n: t for n, t in more.items() if n in table}).items():
        try:
            bad = NOT_DENSE[form](tensor)
        except (RuntimeError, NotImplementedError, IndexError):
            continue  # torch has no such tensor
        with pytest.raises(TypeError, match=rf"^{name}: expected .* got "):
            function(**good() | {name: bad})
        tried += 1
    assert tried


def merged_pair():
    """Tokens (2, 9, 4), and the info of a merge to 6 rows."""
    tokens = torch.randn(2, 9, 4)
    return tokens, elip_kernels.bipartite_merge(tokens, tokens, 3, return_info=True)[2]


def changed(slots, value):
    slots = slots.clone()
    slots[0, 0] = value
    return slots


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "forge"),
    [
        *(("slots", lambda s, v=v: {"slots": changed(s, v)}) for v in (6, -1, 2**31 - 1)),
        ("slots", lambda s: {"slots": s.to_sparse()}),
        *(("num_rows", lambda s, v=v: {"num_rows": v}) for v in ("6", -6, 10**12)),
    ],
)
def test_a_forged_match_is_refused(name, forge):
    tokens, info = merged_pair()
    forged = info._replace(**forge(info.slots))
    rows = torch.randn(2, 6, 4)
    calls = (
        lambda: elip_kernels.apply_merge(tokens, forged),
        forged.source_map,
        lambda: elip_kernels.unmerge(rows, forged),
    )
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=rf"^(info\.{name}|merged): expected "):
            call()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("info.kept", {"kept": torch.tensor([[1, 9], [1, 2]])}),
        ("info.kept", {"kept": torch.tensor([[0, 1], [1, 2]])}),
        ("info.kept", {"kept": torch.ones(3, 2).long()}),
        ("info.weights", {"weights": torch.zeros(9)}),
        ("info.mask", {"mask": torch.ones(2, 9).bool()}),
        ("num_prefix_tokens", {"num_prefix_tokens": -1}),
        ("info.slots", {"slots": torch.full((2, 9), 4, dtype=torch.int32)}),
        ("info.kept", {"slots": torch.zeros(3, 9, dtype=torch.int32)}),
    ],
)
def test_a_forged_reduction_is_refused(name, fields):
    kept = torch.tensor([[1, 5], [2, 8]])
    info = ReductionInfo(kept, torch.zeros(2, 9), None)
    assert info.source_map().shape == (2, 4, 9)
    forged = info._replace(**fields)
    for call in (forged.source_map, lambda: elip_kernels.unmerge(torch.randn(2, 4, 3), forged)):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .* got "):
            call()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("row", [[N, 1], [0, 1], [3, 3], [-2, 3], [2**40, 1]])
def test_positions_that_no_selection_returns_are_refused(row, masked):
    kept = torch.tensor([[2, 4], row])
    mask = torch.ones(B, N, dtype=torch.bool) if masked else None
    tokens = torch.randn(B, N, D)
    with pytest.raises(ValueError, match=r"^kept: expected .* got .* in image 1"):
        elip_kernels.merge_nearest(tokens, kept, tokens, mask=mask)


def test_padding_among_the_positions_is_allowed_more_than_once():
    tokens = torch.randn(1, N, D)
    kept = torch.tensor([[5, -1, 2, -1]])
    merged, _ = elip_kernels.merge_nearest(tokens, kept, tokens)
    assert not merged[:, [2, 4]].any() and merged[:, [1, 3]].any(2).all()


@pytest.mark.parametrize("value", [-1.0, -1e-30, math.nan, math.inf, 3e38])
def test_sizes_that_are_negative_or_whose_sum_may_overflow_are_refused(value):
    tokens, size = torch.randn(B, N, D), torch.ones(B, N)
    size[1, 3] = value
    kept = torch.arange(1, 4).expand(B, -1)
    for call in (
        lambda: elip_kernels.bipartite_merge(tokens, tokens, 3, size=size),
        lambda: elip_kernels.merge_nearest(tokens, kept, tokens, size=size),
    ):
        with pytest.raises(ValueError, match=r"^size: expected .* at least 0 and .*, got "):
            call()


@pytest.mark.parametrize("peak", [1.0, 3e38])
def test_weights_of_scores_whose_sum_exceeds_fp32(peak):
    tokens, scores = torch.randn(B, N, D), torch.rand(B, N - 1) * peak
    _, info = elip_kernels.reduce(tokens, scores, 2, return_info=True)
    _, exact = elip_kernels.reduce(tokens, scores.double(), 2, return_info=True)
    torch.testing.assert_close(info.weights.double(), exact.weights, rtol=1e-6, atol=0.0)
