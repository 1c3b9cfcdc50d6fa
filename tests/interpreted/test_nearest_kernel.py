"""The kernels of merge_nearest in the interpreter, against PyTorch in fp64."""

from collections import Counter

import pytest
import torch

from elip_kernels import merge_nearest, select_tokens
from tests.kernels.test_merge_nearest import inputs

NAN, INF = float("nan"), float("inf")
ALL_OPS = ["elip::nearest_match", "elip::bipartite_merge", "elip::bipartite_merge_backward"]
SHAPES = [(197, 127), (257, 166), (50, 32), (38, 1), (9, 7), (3, 1), (2, 1)]  # N, K
CASES = [(*shape, torch.float32) for shape in SHAPES[2:]]
CASES += [(9, 7, torch.bfloat16), (50, 32, torch.float16)]


def check(launches, tokens, kept, metric, size=None, num_prefix_tokens=1, mask=None):
    """Check forward and backward: slots equal, rows of one token exact, others within an ulp."""
    options = {"num_prefix_tokens": num_prefix_tokens, "mask": mask, "return_info": True}
    before = launches.copy()
    leaf = tokens.detach().requires_grad_()
    out, out_size, info = merge_nearest(leaf, kept, metric, size=size, **options)
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(grad_out)
    assert launches - before == Counter(ALL_OPS)

    exact = tokens.detach().double().requires_grad_()
    double = None if size is None else size.double()
    expected, expected_size, expected_info = merge_nearest(
        exact, kept, metric.double(), size=double, **options
    )
    expected.backward(grad_out.double())
    assert torch.equal(info.slots, expected_info.slots)
    torch.testing.assert_close(out_size.double(), expected_size, atol=0, rtol=1e-6)
    # The interpreter truncates to bf16: one ulp instead of half.
    ulp = torch.finfo(out.dtype).eps
    alone = info.source_map().sum(2) == 1
    alone &= out_size > 0
    assert torch.equal(out[alone], expected[alone].to(out.dtype))
    for got, right in ((out, expected), (leaf.grad, exact.grad)):
        assert ((got.double() - right).abs() <= 1e-6 + 2 * ulp * right.abs()).all()
    return out, info


@pytest.mark.parametrize(("N", "K", "dtype"), CASES, ids=str)
def test_kernel_agrees_with_fp64(launches, N, K, dtype):
    check(launches, *inputs(2, N, 40, 24, K, dtype=dtype))


def test_ties_go_to_the_lower_row(launches):
    metric = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]])[torch.randint(2, (3, 70))]
    metric[0] = 1.0
    tokens, kept, _, _ = inputs(3, 70, K=40)
    check(launches, tokens, kept, metric)
    _, info = check(launches, tokens, kept, torch.ones(3, 70, 4).bfloat16())
    assert (info.source_map()[:, 1].sum(1) == 70 - 40).all()


@pytest.mark.parametrize("bad", [NAN, 0.0, INF])
def test_a_metric_without_direction_ranks_last(launches, bad):
    tokens, kept, metric, size = inputs(3, 19)
    metric[0, 1] = metric[0, 6] = metric[0, 7] = bad
    metric[1] = bad
    metric[2].scatter_(0, kept[2, :3, None].expand(-1, 8), bad)
    check(launches, tokens, kept, metric, size)


def test_padding_is_neither_kept_nor_merged(launches):
    bad = NAN
    tokens, _, metric, size = inputs(3, 40)
    mask = torch.rand(3, 40) < 0.5
    mask[:, 0] = True
    mask[1, 6:] = False
    tokens[~mask] = metric[~mask] = bad
    kept = select_tokens(torch.rand(3, 40), 9, mask=mask)
    launches.clear()
    out, info = check(launches, tokens, kept, metric, size, mask=mask)
    assert info.mask.sum(1)[1] < 9 and not out[~info.mask].any()
