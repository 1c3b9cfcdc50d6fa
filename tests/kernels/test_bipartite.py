"""bipartite_merge as users call it: results of ToMe, the definition, PyTorch features of the op."""

import pytest
import torch
import torch._dynamo.testing

from elip_kernels.info import source_matrix, unmerge
from elip_kernels.ops.bipartite import bipartite_merge

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUM_OFFICIAL_CASES = 5


def inputs(B=2, N=13, D=6, C=8, dtype=torch.float32):
    """Return tokens, metric, size; sizes are 1 to 5."""
    size = torch.randint(1, 6, (B, N)).float()
    return torch.randn(B, N, D).to(dtype), torch.randn(B, N, C).to(dtype), size


def definition(tokens, metric, size, r, p, penalty=None):
    """Compute merged and size of one image with Python lists."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    best = {}
    for a in even:
        similarity, partner = max((float(unit[a] @ unit[b]), -b) for b in odd)
        best[a] = (similarity, -partner)
    delay = torch.zeros(len(tokens)) if penalty is None else penalty
    merged = sorted(even[p:], key=lambda a: (float(delay[a]) - best[a][0], a))[:r]
    groups = [[a] for a in even if a not in merged]
    groups += [[b, *(a for a in merged if best[a][1] == b)] for b in odd]
    sizes = torch.stack([sum(size[n] for n in group) for group in groups])
    rows = [sum(tokens[n].double() * size[n] for n in group) for group in groups]
    return torch.stack(rows) / sizes[:, None], sizes


@pytest.mark.parametrize("p", [2, 5])
@pytest.mark.parametrize("has_penalty", [False, True])
def test_several_prefix_tokens_stay_in_front(p, has_penalty):
    """The last of them takes the place of the class token; the rest takes no part."""
    tokens, metric, size = inputs(N=13 + p)
    penalty = torch.rand(2, 13 + p) if has_penalty else None
    merged, sizes, info = bipartite_merge(
        *(tokens, metric, 4), size=size, penalty=penalty, num_prefix_tokens=p, return_info=True
    )
    n = p - 1
    assert torch.equal(merged[:, :p], tokens[:, :p]) and torch.equal(sizes[:, :p], size[:, :p])
    assert torch.equal(info.slots[:, :n], torch.arange(n, dtype=torch.int32).expand(2, -1))
    for b in range(2):
        delay = None if penalty is None else penalty[b, n:]
        expected, of = definition(tokens[b, n:], metric[b, n:], size[b, n:], 4, 1, delay)
        torch.testing.assert_close(merged[b, n:].double(), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(sizes[b, n:], of)


@pytest.mark.parametrize("k", range(NUM_OFFICIAL_CASES))
def test_reproduces_official_tome(golden, k):
    case = golden("tome_functions")
    meta, case = case.meta["cases"][k], case.under(f"fn{k}/")
    p, (B, N, _) = int(meta["class_token"]), case["x"].shape
    leaf = case["x"].requires_grad_()
    merged, size, info = bipartite_merge(
        leaf,
        case["metric"],
        meta["r_requested"],
        size=case["size"],
        num_prefix_tokens=p,
        return_info=True,
    )
    # Without a class token, ToMe keeps score order; this op keeps image order.
    order = case["unm_idx"].argsort(1).long()
    order = torch.cat([order, torch.arange(order.shape[1], meta["N_out"]).expand(B, -1)], dim=1)

    def ours(name):
        tensor = case[name]
        return tensor.gather(1, order[..., None].expand(-1, -1, tensor.shape[2]))

    torch.testing.assert_close(merged, ours("merged"), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(size[..., None], ours("size_out"), atol=0, rtol=0)
    assert torch.equal(source_matrix(info).float(), ours("source"))
    torch.testing.assert_close(unmerge(merged, info), case["unmerged"], atol=1e-6, rtol=1e-6)
    merged.backward(ours("upstream"))
    torch.testing.assert_close(leaf.grad, case["grad_x"], atol=1e-6, rtol=1e-5)
    plain, _ = bipartite_merge(leaf, case["metric"], meta["r_requested"], num_prefix_tokens=p)
    torch.testing.assert_close(plain, ours("merged_size_none"), atol=1e-6, rtol=1e-6)

    is_merged = torch.zeros(B, N, dtype=torch.bool)
    is_merged.scatter_(1, 2 * case["src_idx"].long(), True)
    first_b = meta["N_out"] - N // 2
    partners = info.slots.gather(1, 2 * case["src_idx"].long()) - first_b
    assert torch.equal(partners, case["dst_idx"])
    assert torch.equal(is_merged[:, ::2], info.slots[:, ::2] >= first_b)


@pytest.mark.parametrize("block", [0, 1, 11])
@pytest.mark.parametrize("run", ["r4", "r8"])
def test_matches_as_a_tower_under_official_tome(golden, run, block):
    case = golden("tome").under(f"{run}/block{block}/")
    metric, source = case["metric"], 2 * case["src_idx"].long()
    (B, N, _), r = metric.shape, source.shape[1]
    _, size, info = bipartite_merge(torch.randn(B, N, 4), metric, r, return_info=True)
    first_b = N - r - N // 2
    assert torch.equal(info.slots.gather(1, source) - first_b, case["dst_idx"])
    assert ((info.slots[:, ::2] >= first_b).sum(1) == r).all()
    if block == 0:
        torch.testing.assert_close(size, case["size"].reshape(B, -1), atol=0, rtol=0)


@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize(("N", "r"), [(2, 1), (3, 1), (12, 5), (13, 1), (13, 6), (50, 99)])
def test_is_the_definition(N, r, p):
    tokens, metric, size = inputs(N=N)
    r = min(r, (N - p) // 2)
    merged, sizes = bipartite_merge(tokens, metric, r, size=size, num_prefix_tokens=p)
    assert merged.shape[1] == N - r
    for b in range(2):
        expected, expected_size = definition(tokens[b], metric[b], size[b], r, p)
        torch.testing.assert_close(merged[b].double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(sizes[b], expected_size)


def test_ties_go_to_the_lower_index():
    metric = torch.ones(1, 9, 4)
    _, _, info = bipartite_merge(torch.randn(1, 9, 2), metric, 2, return_info=True)
    assert info.slots.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]
    _, _, info = bipartite_merge(
        torch.randn(1, 9, 2), metric, 2, num_prefix_tokens=0, return_info=True
    )
    assert info.slots.tolist() == [[3, 3, 3, 4, 0, 5, 1, 6, 2]]


@pytest.mark.parametrize("bad", [float("nan"), 0.0, 1e30, float("inf")])
def test_a_metric_without_direction_ranks_last(bad):
    tokens, metric, _ = inputs(N=9)
    metric[:, 3] = metric[:, 4] = bad
    _, _, info = bipartite_merge(tokens, metric, 3, return_info=True)
    into_3 = info.slots == info.slots[:, 3:4]
    assert into_3.sum() == 2  # only the token itself
    assert (info.slots[:, 4] == 1).all()  # the only other even token
    merged, _ = bipartite_merge(tokens, metric, 4)
    assert merged.isfinite().all()


def test_nothing_to_merge_returns_the_tokens():
    tokens, metric, size = inputs()
    for arguments in ({"r": 0}, {"r": 3}):
        few = slice(None) if arguments["r"] == 0 else slice(2)
        x = tokens[:, few]
        merged, ones, info = bipartite_merge(x, metric[:, few], **arguments, return_info=True)
        assert merged is x
        assert torch.equal(ones, torch.ones(x.shape[:2]))
        assert torch.equal(unmerge(merged, info), x)
    _, same = bipartite_merge(tokens, metric, 0, size=size[..., None])
    assert torch.equal(same, size)


def test_steps_chain_and_sizes_count():
    tokens, metric, _ = inputs(N=21)
    merged, size, first = bipartite_merge(tokens, metric, 6, return_info=True)
    merged, size, then = bipartite_merge(
        merged, torch.randn(2, 15, 8), 5, size=size, return_info=True
    )
    both = then.source_map(first.source_map())
    source = both.float()
    assert torch.equal(source, source_matrix(then).float() @ source_matrix(first).float())
    assert torch.equal(size, source.sum(2))
    mean = (source @ tokens) / size[..., None]
    torch.testing.assert_close(merged, mean, atol=1e-6, rtol=0)
    assert torch.equal(unmerge(merged, both), unmerge(unmerge(merged, then), first))


def test_means_of_subnormal_sizes_are_exact():
    tokens, metric, _ = inputs()
    size = torch.full(tokens.shape[:2], 2.0**-140)
    merged, sizes = bipartite_merge(tokens, metric, 3, size=size)
    expected, ones = bipartite_merge(tokens, metric, 3)
    torch.testing.assert_close(merged, expected)
    assert torch.equal(sizes, ones * 2.0**-140)


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_gradients_in_fp64(check, with_size):
    tokens, metric, size = inputs(dtype=torch.float64)
    size = size.double() + 0.25 if with_size else None
    assert check(
        lambda t: bipartite_merge(t, metric, 5, size=size)[0].square(), (tokens.requires_grad_(),)
    )


LENGTHS = torch.tensor([13, 8, 3, 1, 13])
MERGES = torch.tensor([4, 3, 0, 0, 2])


@pytest.mark.parametrize("p", [0, 1, 3])
@pytest.mark.parametrize("r", [1, 4, 6])
def test_padded_images_merge_as_they_do_alone(p, r):
    """Each has its own number of pairs, and the values of padding play no part."""
    lengths = LENGTHS.clamp(min=p)
    tokens, metric, size = inputs(B=5)
    penalty = torch.rand(5, 13)
    padding = torch.arange(13) >= lengths[:, None]
    metric[padding] = metric[:, :1].expand(-1, 13, -1)[padding]  # as similar as can be
    options = {"num_prefix_tokens": p, "return_info": True}
    for merges in (None, MERGES.clamp(max=r)):
        rows = r if merges is None else min(r, 13 - int((lengths - merges).max()))
        merged, sizes, info = bipartite_merge(
            *(tokens, metric, rows), size=size, penalty=penalty, lengths=lengths, merges=merges,
            **options,
        )  # fmt: skip
        assert torch.equal(info.mask, sizes > 0)
        for b, n in enumerate(lengths.tolist()):
            alone, sizes_alone, info_alone = bipartite_merge(
                *(tokens[b : b + 1, :n], metric[b : b + 1, :n]),
                r if merges is None else int(merges[b]),
                size=size[b : b + 1, :n],
                penalty=penalty[b : b + 1, :n],
                **options,
            )
            R = alone.shape[1]
            assert torch.equal(merged[b, :R], alone[0])
            assert torch.equal(sizes[b, :R], sizes_alone[0])
            assert torch.equal(info.slots[b, :n], info_alone.slots[0])
            assert not merged[b, R:].any() and not sizes[b, R:].any()


def test_padding_gets_no_gradient():
    tokens, metric, _ = inputs(B=5, dtype=torch.float64)
    options = {"lengths": LENGTHS, "merges": MERGES}
    merged, _ = bipartite_merge(tokens.requires_grad_(), metric, 2, **options)
    merged.square().sum().backward()
    padding = torch.arange(13) >= LENGTHS[:, None]
    assert not tokens.grad[padding].any() and tokens.grad[~padding].any(-1).all()
    assert torch.autograd.gradcheck(
        lambda t: bipartite_merge(t, metric, 2, **options)[0], (tokens,)
    )


def test_too_few_rows_for_an_image_are_refused():
    tokens, metric, _ = inputs(B=5)
    with pytest.raises(ValueError, match="r: expected at most 2, so that 11 rows are left, got 3"):
        bipartite_merge(tokens, metric, 3, lengths=LENGTHS, merges=MERGES)
    with pytest.raises(ValueError, match="merges: expected None without lengths"):
        bipartite_merge(tokens, metric, 3, merges=MERGES)
    with pytest.raises(ValueError, match="r: expected fewer than N = 13"):
        bipartite_merge(tokens, metric, 13, lengths=LENGTHS, merges=MERGES)
