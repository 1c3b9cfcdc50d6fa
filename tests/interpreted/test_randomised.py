"""Random cases of every op, forward and backward: the kernels against PyTorch in fp64.

The default run draws a few cases; see `profiles.py` for many. The draws are the same in every run.
"""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import elip_kernels
import tests.interpreted.profiles  # noqa: F401
from elip_kernels.ops.fuse_text import fuse
from elip_kernels.testing import kernels_on_cpu
from tests.interpreted import test_attention_column_mean_kernel as column_mean
from tests.interpreted import test_bipartite_kernel as bipartite
from tests.interpreted import test_nearest_kernel as nearest
from tests.interpreted import test_reduce_kernel as reduce
from tests.interpreted import test_select_diverse_kernel as selection
from tests.interpreted.absorbed import BUDGET, block, error, row_in_fp64

INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-42, -1e-39, 6e-8, 1e-3, 1e-2])

few = st.integers(2, 70)
tokens_of_an_image = st.one_of(few, few, few, st.integers(71, 300))
shares = st.floats(0, 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "LND", "sliced", "every second", "expanded"])
heads = st.integers(1, 24)
seeds = st.integers(0, 2**31)
shapes = st.fixed_dictionaries(
    {"B": st.integers(1, 3), "N": tokens_of_an_image, "D": st.integers(1, 96)}
)
wide_shapes = st.fixed_dictionaries(
    {
        "B": st.just(1),
        "N": st.integers(2, 20),
        "D": st.one_of(st.sampled_from([768, 1024, 1152, 1408, 1664, 2048]), st.integers(97, 2048)),
    }
)


@pytest.fixture(scope="module")
def launches():
    with kernels_on_cpu() as counter:
        yield counter


def part(share, most):
    """Draw an integer from 1 to `most`."""
    return 1 + round(share * (most - 1))


def laid_out(layout, B, N, D, dtype):
    """Return (B, N, D) of N(0, 1) with the given memory layout."""
    if layout == "LND":
        return torch.randn(N, B, D).to(dtype).transpose(0, 1)
    if layout == "sliced":
        return torch.randn(B, N + 3, D + 5).to(dtype)[:, 2 : N + 2, 3 : D + 3]
    if layout == "every second":
        return torch.randn(B, N, 2 * D).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(1, N, D).to(dtype).expand(B, -1, -1)
    return torch.randn(B, N, D).to(dtype)


def scores_of(kind, B, C):
    """Return scores (B, C) whose sum is about one at most."""
    if kind == "row":
        return torch.randn(B, C).softmax(1)
    if kind == "signed":
        return torch.randn(B, C) / C
    if kind == "ties":
        return torch.randint(3, (B, C)) / C
    return SPECIAL[torch.randint(len(SPECIAL), (B, C))]


def check_moved(launches, out, tokens, leaf, scores, keep, **options):
    """Check `out` and the gradient of `leaf` against `reduce` of these scores in fp64."""
    grad_out = torch.randn(out.shape).to(out.dtype)
    before = launches["elip::reduce_backward"]
    out.backward(grad_out)
    assert launches["elip::reduce_backward"] == before + 1
    expected, exact, grad = reduce.in_fp64(tokens, scores, keep, grad_out, **options)
    copied = out.shape[1] - options["merge"]
    assert torch.equal(out[:, :copied], expected[:, :copied].to(out.dtype))
    ulp = torch.finfo(out.dtype).eps  # the interpreter truncates to bf16
    for got, right in ((out, expected), (leaf.grad, grad)):
        assert ((got.double() - right).abs() <= 1e-6 + 2 * ulp * right.abs()).all()
    return exact


@given(
    shape=shapes,
    share=shares,
    dtype=dtypes,
    score_dtype=dtypes,
    layout=layouts,
    kind=st.sampled_from(["row", "signed", "ties", "specials"]),
    real=st.sampled_from([None, 0.0, 0.2, 0.6, 0.95]),
    num_prefix_tokens=st.integers(0, 3),
    merge=st.booleans(),
    seed=seeds,
)
def test_reduce(
    launches, shape, share, dtype, score_dtype, layout, kind, real, num_prefix_tokens, seed, **flags
):
    torch.manual_seed(seed)
    p, B = num_prefix_tokens, shape["B"]
    shape["N"] += p
    scores = scores_of(kind, B, shape["N"] - p).to(score_dtype)
    if flags["merge"] and kind == "signed":
        scores = scores.abs()
    mask = None if real is None else torch.rand(B, shape["N"]) < real
    tokens = laid_out(layout, **shape, dtype=dtype)
    keep = part(share, shape["N"] - p - 1)
    reduce.check(launches, tokens, scores, keep, mask=mask, num_prefix_tokens=p, **flags)


@given(
    B=st.integers(1, 3),
    G=st.integers(1, 12),
    group=st.sampled_from([1, 1, 2, 3, 4]),
    N=few,
    d=st.integers(1, 96),
    dtype=dtypes,
    scale=st.sampled_from([None, 0.05, 1.0]),
    is_open=st.sampled_from([None, 0.1, 0.7]),
    packed=st.booleans(),
    seed=seeds,
)
def test_generic_row(launches, B, G, group, N, d, dtype, scale, is_open, packed, seed):
    torch.manual_seed(seed)
    q, k = torch.randn(B, group * G, d).to(dtype), torch.randn(B, G, N, d).to(dtype)
    if packed:  # as after a fused projection
        packs = torch.randn(B, N, (group + 2) * G, d).to(dtype).transpose(1, 2)
        q, k, _ = packs.split((group * G, G, G), 1)
        q = q[:, :, 0]
    mask = None if is_open is None else torch.rand(B, N) < is_open
    before = launches["elip::cls_attention"]
    got = elip_kernels.cls_attention(q, k, scale=scale, mask=mask)
    exact = elip_kernels.cls_attention(q.double(), k.double(), scale=scale, mask=mask)
    assert launches["elip::cls_attention"] == before + 1  # fp64 runs PyTorch
    closed = torch.zeros(B, dtype=torch.bool) if mask is None else ~mask.any(1)
    assert got[closed].isnan().all() and exact[closed].isnan().all()
    if not closed.all():
        assert error(got[~closed], exact[~closed]) <= BUDGET[dtype]


@given(
    B=st.integers(1, 3),
    G=st.integers(1, 3),
    group=st.sampled_from([1, 1, 2, 4]),
    M=tokens_of_an_image,
    N=tokens_of_an_image,
    d=st.integers(1, 64),
    dtype=dtypes,
    scale=st.sampled_from([None, 0.05, 1.0]),
    shares=st.sampled_from([(None, None), (0.7, None), (None, 0.3), (0.1, 0.1), (0.5, 0.9)]),
    packed=st.booleans(),
    seed=seeds,
)
def test_attention_received(B, G, group, M, N, d, dtype, scale, shares, packed, seed, launches):
    torch.manual_seed(seed)
    if packed:  # as after a fused projection
        M, packs = N, torch.randn(B, N, (group + 2) * G, d).to(dtype).transpose(1, 2)
        q, k, _ = packs.split((group * G, G, G), 1)
    else:
        q, k = torch.randn(B, group * G, M, d).to(dtype), torch.randn(B, G, N, d).to(dtype)
    drawn = zip(("mask", "query_mask"), (N, M), shares, strict=True)
    masks = {name: torch.rand(B, n) < share for name, n, share in drawn if share is not None}
    before = launches["elip::attention_column_mean"]
    column_mean.check(q, k, scale=scale, **masks)
    assert launches["elip::attention_column_mean"] == before + 1  # fp64 runs PyTorch


@given(shape=shapes, H=heads, dtype=dtypes, layout=layouts, seed=seeds)
def test_row_from_tokens(launches, shape, H, dtype, layout, seed):
    torch.manual_seed(seed)
    tokens = laid_out(layout, **shape, dtype=dtype)
    cls, arguments = torch.randn(shape["B"], shape["D"]).to(dtype), block(shape["D"], H, dtype)
    before = launches["elip::cls_attention_from_tokens"]
    got = elip_kernels.cls_attention_from_tokens(tokens, cls, **arguments)
    assert launches["elip::cls_attention_from_tokens"] == before + 1
    assert error(got, row_in_fp64(tokens, cls, arguments)) <= BUDGET[dtype]


@given(
    shape=st.one_of(shapes, shapes, wide_shapes),
    H=heads,
    dtype=dtypes,
    layout=layouts,
    biased=st.booleans(),
    seed=seeds,
)
def test_attention_output(launches, shape, H, dtype, layout, biased, seed):
    torch.manual_seed(seed)
    tokens, D = laid_out(layout, **shape, dtype=dtype), shape["D"]
    H = H if D <= 96 else 1 + H % 3  # few programs of wide heads: the interpreter takes a minute
    cls, arguments = torch.randn(shape["B"], D).to(dtype), block(D, H, dtype)
    arguments["v_weight"] = (torch.randn(H * 8, D) / D**0.5).to(dtype)
    arguments["v_bias"] = torch.randn(H * 8).to(dtype) if biased else None
    before = launches["elip::cls_attention_output"]
    got = elip_kernels.cls_attention_output(tokens, cls, **arguments)
    assert launches["elip::cls_attention_output"] == before + 1
    wide = {n: v.double() if torch.is_tensor(v) else v for n, v in arguments.items()}
    exact = elip_kernels.cls_attention_output(tokens.double(), cls.double(), **wide)
    rounding = torch.finfo(dtype).eps * exact.abs()
    assert ((got - exact).abs() <= BUDGET[dtype] * exact.abs().max() + rounding).all()


@given(
    shape=shapes,
    share=shares,
    H=heads,
    dtype=dtypes,
    layout=layouts,
    merge=st.booleans(),
    fusion=st.sampled_from([0.0, 0.3, 1.0]),
    guidance_norm=st.sampled_from(["none", "match"]),
    has_dry_run=st.booleans(),
    seed=seeds,
)
def test_score_reduce(
    launches, shape, share, H, dtype, layout, fusion, guidance_norm, has_dry_run, seed, **flags
):
    torch.manual_seed(seed)
    shape["N"] += 1
    tokens = laid_out(layout, **shape, dtype=dtype)
    cls, arguments = torch.randn(shape["B"], shape["D"]).to(dtype), block(shape["D"], H, dtype)
    leaf, keep = tokens.detach().requires_grad_(), part(share, shape["N"] - 2)
    before = launches["elip::score_reduce"]
    text = torch.randn(shape["B"], shape["D"]).to(dtype)
    text[0] = 0
    guide = {"text": text, "fusion": fusion, "guidance_norm": guidance_norm}
    scored = torch.randn(tokens.shape).to(dtype) if has_dry_run else None
    out, info, row = elip_kernels.score_reduce(
        leaf, cls, keep, scored=scored, return_info=True, **flags, **guide, **arguments
    )
    assert launches["elip::score_reduce"] == before + 1
    fused = fuse(cls.double(), text.double(), fusion, guidance_norm == "match")
    scored = tokens if scored is None else scored
    assert error(row, row_in_fp64(scored, fused, arguments)) <= BUDGET[dtype]
    exact = check_moved(launches, out, tokens, leaf, row, keep, **flags)
    assert torch.equal(info.kept, exact.kept)
    assert torch.allclose(info.weights.double(), exact.weights, atol=1e-6, rtol=0)


def is_clear(metric, penalty, r, p):
    """Return whether no deciding similarities are so close that rounding could swap them."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).topk(min(2, unit.shape[1] // 2), dim=2).values
    score = best[..., 0] if penalty is None else best[..., 0] - penalty[:, ::2]
    ranked = score[:, p:].sort(1, descending=True).values
    gaps = [best[..., :-1] - best[..., 1:], ranked[:, r - 1 : r] - ranked[:, r : r + 1]]
    return all((gap > 1e-5).all() for gap in gaps)


merging = {
    "shape": shapes,
    "C": st.integers(4, 80),
    "share": shares,
    "dtype": dtypes,
    "metric_dtype": dtypes,
    "layout": layouts,
    "kind": st.sampled_from(["normal", "ties", "some without direction"]),
    "has_size": st.booleans(),
    "seed": seeds,
}


@given(**merging, has_penalty=st.booleans(), p=st.integers(0, 1))
def test_bipartite_merge(
    launches, shape, C, share, dtype, metric_dtype, layout, kind, has_size, has_penalty, p, seed
):
    torch.manual_seed(seed)
    shape["N"] += p
    B, N = shape["B"], shape["N"]
    r = part(share, (N - p) // 2)
    metric = laid_out(layout, B, N, C, metric_dtype)
    penalty = torch.rand(B, N) if has_penalty else None
    if kind == "ties":
        metric = torch.randint(2, (B, N, 4)).to(metric_dtype) * 2 - 1
        penalty = None if penalty is None else penalty.round()
    else:
        assume(is_clear(metric, penalty, r, p))
    if kind == "some without direction":
        metric = metric.masked_fill(torch.rand(B, N, 1) < 0.2, [NAN, 0.0, INF][seed % 3])
    size = torch.randint(1, 6, (B, N)).float() if has_size else None
    tokens = laid_out(layout, **shape, dtype=dtype)
    bipartite.check(launches, tokens, metric, r, size, p, penalty)


def is_near(metric, kept):
    """Return whether no two kept tokens are so similar to a token that rounding could swap them."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    targets = unit.gather(1, kept[..., None].expand(-1, -1, unit.shape[2]))
    best = (unit @ targets.mT).topk(min(2, kept.shape[1]), dim=2).values
    return (best[..., :-1] - best[..., 1:] > 1e-5).all()


@given(**merging, masked=st.booleans(), p=st.integers(0, 3))
def test_merge_nearest(
    launches, shape, C, share, dtype, metric_dtype, layout, kind, has_size, masked, p, seed
):
    torch.manual_seed(seed)
    shape["N"] += p
    B, N = shape["B"], shape["N"]
    mask = torch.rand(B, N) < 0.7 if masked else None
    attn = torch.rand(B, N)
    keep, options = part(share, N - p), {"mask": mask, "num_prefix_tokens": p}
    kept = elip_kernels.select_tokens(attn, keep, **options)
    assert torch.equal(kept, elip_kernels.select_tokens(attn.double(), keep, **options))
    metric = laid_out(layout, B, N, C, metric_dtype)
    if kind == "ties":
        metric = torch.randint(2, (B, N, 4)).to(metric_dtype) * 2 - 1
    else:
        assume(is_near(metric, kept))
    if kind == "some without direction":
        metric = metric.masked_fill(torch.rand(B, N, 1) < 0.2, [NAN, 0.0, INF][seed % 3])
    size = torch.randint(1, 6, (B, N)).float() if has_size else None
    tokens = laid_out(layout, **shape, dtype=dtype)
    nearest.check(launches, tokens, kept, metric, size, **options)


@given(
    shape=shapes,
    share=st.floats(0, 0.4),
    dtype=dtypes,
    layout=layouts,
    select=st.sampled_from(selection.SELECTIONS),
    real=st.sampled_from([None, 0.1, 0.6, 0.95]),
    seed=seeds,
)
def test_selections(launches, shape, share, dtype, layout, select, real, seed):
    torch.manual_seed(seed)
    B, N = shape["B"], shape["N"]
    tokens = laid_out(layout, **shape, dtype=dtype)
    options = {} if real is None else selection.options_of(select, B, N, real)
    selection.check(select, tokens, part(share, N), **options)
