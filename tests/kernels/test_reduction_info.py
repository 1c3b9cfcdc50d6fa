"""Source maps: which tokens each output token contains, after one step and after several."""

import pytest
import torch

import elip_kernels
from elip_kernels import apply_merge
from elip_kernels.info import source_matrix, unmerge

B, N = 2, 13


def reduced(tokens, keep, **options):
    attn = torch.rand(tokens.shape[:2])
    return elip_kernels.reduce(tokens, attn, keep, return_info=True, **options)


def held_after(held, info):
    """Return the sets of first tokens that each token contains after a step, by brute force."""
    kept, p = info[0], info[1]
    rest = set().union(*(held[n] for n in range(p, len(held)) if n not in kept))
    return [*held[:p], *(held[n] for n in kept), *([rest] if info[2] else [])]


def as_map(held, num_first):
    rows = [[n in tokens for n in range(num_first)] for tokens in held]
    return torch.tensor(rows)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("p", [1, 3])
def test_maps_chain_through_merged_tokens(p, merge):
    tokens = torch.randn(B, N, 4)
    held, source = [[{n} for n in range(N)] for _ in range(B)], None
    for keep in (8, 5, 2):
        tokens, info = reduced(tokens, keep, num_prefix_tokens=p, merge=merge)
        source = info.source_map(source)
        for b in range(B):
            held[b] = held_after(held[b], (info.kept[b].tolist(), p, merge))
            assert torch.equal(source[b], as_map(held[b], N))
    assert source.shape == (B, tokens.shape[1], N)
    assert source.any(1).all() == merge


@pytest.mark.parametrize("merge", [True, False])
def test_unmerge_gives_every_token_its_row(merge):
    tokens = torch.randn(B, N, 4)
    out, first = reduced(tokens, 7, merge=merge)
    out, then = reduced(out, 3, merge=merge)
    source = then.source_map(first.source_map())
    got = unmerge(out.requires_grad_(), source)
    for b in range(B):
        for n in range(N):
            rows = [t for t in range(out.shape[1]) if source[b, t, n]]
            assert len(rows) == 1 or (not rows and not merge)
            expected = out[b, rows[0]] if rows else torch.zeros(4)
            assert torch.equal(got[b, n], expected)
    assert torch.equal(unmerge(out, then), unmerge(out, then.source_map()))
    got.sum().backward()
    assert torch.equal(out.grad[..., 0], source.sum(2).float())


def test_a_source_map_compiles_whole():
    def features(tokens, attn):
        out, info = elip_kernels.reduce(tokens, attn, 5, return_info=True)
        return unmerge(out, info)

    inputs = torch.randn(B, N, 4), torch.rand(B, N)
    compiled = torch.compile(features, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), features(*inputs))


@pytest.mark.parametrize("with_size", [True, False])
@pytest.mark.parametrize("r", [0, 4])
def test_merge_by_repeats_the_merge(r, with_size):
    tokens, size = torch.randn(B, N, 4), torch.rand(B, N) + 1 if with_size else None
    metric = torch.randn(B, N, 8)
    merged, sizes, info = elip_kernels.bipartite_merge(
        tokens, metric, r, size=size, return_info=True
    )
    again = apply_merge(tokens, info, size=size)
    assert torch.equal(again[0], merged) and torch.equal(again[1], sizes)
    if with_size:
        assert torch.equal(apply_merge(tokens, info, size=size[..., None])[1], sizes)


def test_merge_by_merges_other_tokens_with_gradient():
    tokens = torch.randn(B, N, 4)
    _, _, info = elip_kernels.bipartite_merge(tokens, tokens, 5, return_info=True)
    positions = torch.randn(B, N, 3, dtype=torch.float64, requires_grad=True)
    merged, sizes = apply_merge(positions, info)
    source = source_matrix(info).double()
    torch.testing.assert_close(merged, source @ positions / sizes[..., None])
    assert torch.autograd.gradcheck(lambda x: apply_merge(x, info)[0], (positions,))
