"""As many tokens as an image of 1,024 pixels has; results do not depend on the batch."""

import pytest
import torch

import elip_kernels
from elip_kernels._operator import OPERATORS
from tests.interpreted.absorbed import BUDGET, block, error
from tests.interpreted.test_score_reduce_kernel import in_fp64


def test_a_boundary_of_many_tokens_runs_the_kernels(launches, monkeypatch):
    N, D, dtype = 4097, 16, torch.bfloat16

    def never(*args):
        raise AssertionError("the PyTorch implementation ran")

    keep, tokens, cls = N // 3, torch.randn(1, N, D).to(dtype), torch.randn(1, D).to(dtype)
    arguments, tokens = block(D, 2, dtype), tokens.requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(OPERATORS["score_reduce"], "reference", never)
        out, info, row = elip_kernels.score_reduce(tokens, cls, keep, return_info=True, **arguments)
    assert launches["elip::score_reduce"] == 1
    _, _, exact_row = in_fp64(tokens, cls, keep, arguments)
    assert error(row, exact_row) <= BUDGET[dtype]
    expected, exact = elip_kernels.reduce(
        tokens.detach().double(), row.double(), keep, return_info=True
    )
    assert torch.equal(info.kept, exact.kept)
    assert torch.equal(out[:, : keep + 1], expected[:, : keep + 1].to(dtype))
    scale = torch.finfo(dtype).eps * expected.abs() + 1e-6
    assert ((out.double() - expected).abs() <= 2 * scale).all()
    out.sum().backward()
    assert tokens.grad.isfinite().all()


SCORES = {
    "ties": lambda scores: (scores * 3).round(),
    "not numbers": lambda scores: scores.where(scores < 1, float("nan")),
    "infinities": lambda scores: scores.where(scores < 1, float("inf")),
}


@pytest.mark.parametrize("kind", SCORES)
def test_scores_tile_by_tile_select_what_scores_at_once_do(launches, monkeypatch, kind):
    keep = 70
    scores, mask = SCORES[kind](torch.randn(2, 201)), torch.rand(2, 201) < 0.8
    mask[0] = torch.arange(201) < 40  # fewer than are kept
    tokens, options = torch.randn(2, 201, 3), {"mask": mask, "return_info": True}
    held = elip_kernels.reduce(tokens, scores, keep, **options)
    kept = elip_kernels.select_tokens(scores, keep, mask=mask)
    for name, value in {"MAX_MOVED": 9, "MAX_SELECTED": 9, "TILE": 64}.items():
        monkeypatch.setattr(f"elip_kernels.launch.{name}", value)
    streamed = elip_kernels.reduce(tokens, scores, keep, **options)
    assert torch.equal(streamed[1].kept, held[1].kept)
    assert torch.equal(streamed[1].mask, held[1].mask)
    torch.testing.assert_close(streamed[1].weights, held[1].weights, equal_nan=True)
    torch.testing.assert_close(streamed[0], held[0], equal_nan=True)
    assert torch.equal(elip_kernels.select_tokens(scores, keep, mask=mask), kept)
    assert launches["elip::reduce"] == 2 and launches["elip::select"] == 2


def test_merging_many_tokens(launches, monkeypatch):
    """Large tiles keep the number of programs small in the interpreter."""
    N = 1026
    tiles = {"BLOCK_A": 512, "BLOCK_B": 512, "BLOCK_C": 16, "num_warps": 4}
    monkeypatch.setattr("elip_kernels.launch.bipartite_match", lambda C, size: tiles)
    order = {"BLOCK_N": 512, "BLOCK_M": 512, "num_warps": 4}
    monkeypatch.setattr("elip_kernels.launch.order_by_row", lambda N: order)
    tokens, metric = torch.randn(1, N, 3), torch.randn(1, N, 8)
    size, penalty = torch.randint(1, 6, (1, N)).float(), 3.0 * (torch.rand(1, N) < 0.3)
    kept, r = elip_kernels.select_tokens(torch.rand(1, N), N // 8), N // 3
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf, wide = tokens.to(dtype, copy=True).requires_grad_(), metric.to(dtype)
        options = {"size": size.to(dtype), "return_info": True}
        pairs = elip_kernels.bipartite_merge(leaf, wide, r, penalty=penalty.to(dtype), **options)
        nearest = elip_kernels.merge_nearest(leaf, kept, wide, **options)
        (pairs[0].square().sum() + nearest[0].square().sum()).backward()
        slots = [pairs[2].slots, nearest[2].slots]
        results.append([*pairs[:2], *nearest[:2], leaf.grad, *slots])
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact.to(ours.dtype), atol=1e-4, rtol=1e-5)
