"""The kernels of bipartite_merge in the interpreter, against PyTorch in fp64."""

from collections import Counter

import pytest
import torch

import elip_kernels.ops.bipartite as bipartite
from elip_kernels.info import source_matrix
from elip_models.strategies.nearness import patch_places, with_nearness

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
PENALTIES = ["strided", "three of all", "without a number"]
ALL_OPS = [f"elip::bipartite_{name}" for name in ("match", "merge", "merge_backward")]
SHAPES = [(197, 16), (257, 128), (50, 24), (38, 1), (9, 4), (3, 1), (2, 1)]  # N, r
ONE = [(41, torch.float32), (66, torch.bfloat16)]
ONE += [(N, dtype) for N in (197, 257, 577) for dtype in DTYPES]
CASES = [(*shape, torch.float32) for shape in SHAPES[2:]]
CASES += [(9, 4, torch.bfloat16), (50, 24, torch.float16)]


def inputs(B, N, D=40, C=24, dtype=torch.float32):
    """Return tokens, metric, size; sizes are 1 to 5."""
    size = torch.randint(1, 6, (B, N)).float()
    return torch.randn(B, N, D).to(dtype), torch.randn(B, N, C).to(dtype), size


def check(launches, tokens, metric, r, size=None, num_prefix_tokens=1, penalty=None, **options):
    """Check forward and backward: slots equal, rows of one token exact, others within an ulp."""
    options |= {"num_prefix_tokens": num_prefix_tokens, "return_info": True}
    before = launches.copy()
    leaf = tokens.detach().requires_grad_()
    out, out_size, info = bipartite.bipartite_merge(
        leaf, metric, r, size=size, penalty=penalty, **options
    )
    grad_out = torch.randn(out.shape).to(out.dtype)
    out.backward(grad_out)
    assert launches - before == Counter(ALL_OPS)

    exact = tokens.detach().double().requires_grad_()
    double = {"size": size, "penalty": penalty}
    double = {name: None if tensor is None else tensor.double() for name, tensor in double.items()}
    expected, expected_size, expected_info = bipartite.bipartite_merge(
        exact, metric.double(), r, **double, **options
    )
    expected.backward(grad_out.double())
    assert torch.equal(info.slots, expected_info.slots)
    torch.testing.assert_close(out_size.double(), expected_size, atol=0, rtol=1e-6)
    # The interpreter truncates to bf16: one ulp instead of half.
    ulp = torch.finfo(out.dtype).eps
    alone = source_matrix(info).sum(2) == 1
    assert torch.equal(out[alone], expected[alone].to(out.dtype))
    for got, right in ((out, expected), (leaf.grad, exact.grad)):
        assert ((got.double() - right).abs() <= 1e-6 + 2 * ulp * right.abs()).all()
    return out, info


@pytest.mark.parametrize(("N", "r", "dtype"), CASES, ids=str)
def test_kernel_agrees_with_fp64(launches, N, r, dtype):
    tokens, metric, size = inputs(2, N, dtype=dtype)
    check(launches, tokens, metric, r, size, num_prefix_tokens=int(N > 2))


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_places_beside_features_match_as_in_fp64(launches, dtype):
    """The metric of ToMe with `reach` is fp32, also beside tokens of bf16."""
    tokens, metric, size = inputs(2, 36, dtype=dtype)
    places = patch_places((5, 7), 1, metric).expand(2, -1, -1)
    check(launches, tokens, with_nearness(metric, places, (5, 7), 2.0), 12, size)


def test_ties_go_to_the_lower_index(launches):
    r = 4
    metric = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1]])[torch.randint(2, (3, 20))]
    metric[0] = 1.0
    tokens = torch.randn(3, 20, 8)
    check(launches, tokens, metric, r)
    check(launches, tokens, metric.bfloat16(), r)
    _, info = check(launches, tokens, torch.ones(3, 20, 4), r)
    assert (info.slots[:, 2 : 2 * r + 2 : 2] == 10 - r).all()


@pytest.mark.parametrize(("N", "p"), [(70, 1)])
def test_padded_images_have_their_own_number_of_pairs(launches, N, p):
    """Whole tiles of both halves are padding; one image is full, one has no pair."""
    dtype = torch.float32
    tokens, metric, size = inputs(4, N, dtype=dtype)
    lengths = torch.tensor([N, N // 2 + 1, 3 + p, p or 1])
    merges = torch.tensor([N // 4, 9, 1, 0])
    for penalty in (None, torch.rand(4, N)):
        for own in (None, merges):
            check(launches, tokens, metric, N // 4, size, p, penalty, lengths=lengths, merges=own)


@pytest.mark.parametrize("bad", [NAN, 0.0, INF])
def test_a_metric_without_direction_ranks_last(launches, bad):
    r = 5
    tokens, metric, size = inputs(3, 19)
    metric[0, 1] = metric[0, 6] = metric[0, 7] = bad
    metric[1, ::2] = bad
    metric[2, 1::2] = bad
    check(launches, tokens, metric, r, size)


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_penalty_delays_a_source(launches, kind):
    tokens, metric, size = inputs(3, 19)
    penalty = torch.rand(19, 6).T[::2]
    if kind == "three of all":
        penalty = 3.0 * (penalty > 0.5)
    elif kind == "without a number":
        penalty = penalty.masked_fill(torch.rand(3, 19) < 0.3, NAN)
        penalty[:, 4:9:2] = torch.tensor([INF, -INF, NAN])
        metric[1, 6] = metric[2, 12] = NAN
    _, plain = check(launches, tokens, metric, 4, size)
    _, delayed = check(launches, tokens, metric, 4, size, penalty=penalty)
    assert not torch.equal(plain.slots, delayed.slots)


def test_a_match_may_be_a_view(launches):
    """A user may pass a modified `BipartiteInfo`, not only the one that the op returned."""
    tokens, metric, _ = inputs(4, 21)
    _, _, info = bipartite.bipartite_merge(tokens, metric, 6, return_info=True)
    view = info.slots[:1].expand(2, -1)
    grad, results = torch.randn(2, 15, 40), []
    for slots in (view, view.contiguous().clone()):
        leaf = tokens[:2].clone().requires_grad_()
        out, _ = bipartite.apply_merge(leaf, info._replace(slots=slots))
        out.backward(grad)
        results.append((out, leaf.grad))
    assert launches["elip::bipartite_merge"] == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
