"""attention_column_mean against the whole attention map."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import elip_kernels
from elip_kernels.ops.attention_column_mean import QUERIES, column_mean_reference

B, H, M, N, D = 2, 4, 19, 37, 12


def queries_and_keys(G=H, M=M, N=N, dtype=torch.float64):
    return torch.randn(B, H, M, D).to(dtype), torch.randn(B, G, N, D).to(dtype)


def in_full(q, k, *, scale=D**-0.5, mask=None, query_mask=None):
    """Return column means of the map (B, H, M, N) of PyTorch's own attention."""
    (B, _, M, _), N = q.shape, k.shape[2]
    bias = None if mask is None else mask[:, None, None].expand(B, 1, M, N)
    values = torch.eye(N, dtype=q.dtype).expand(B, k.shape[1], N, N)
    rows = F.scaled_dot_product_attention(
        q, k, values, attn_mask=bias, scale=scale, enable_gqa=True
    )
    counted = torch.ones(B, M, dtype=torch.bool) if query_mask is None else query_mask
    return torch.stack([rows[b][:, counted[b]].mean((0, 1)) for b in range(B)])


def masks(M=M, N=N):
    """Return masks of keys and queries; for every image the first one is True."""
    mask, query_mask = torch.rand(B, N) > 0.4, torch.rand(B, M) > 0.4
    mask[:, 0] = query_mask[:, 0] = True
    return {"mask": mask, "query_mask": query_mask}


def check(q, k, atol=1e-12, **options):
    got = elip_kernels.attention_column_mean(q, k, **options)
    torch.testing.assert_close(got, in_full(q, k, **options), atol=atol, rtol=0)
    torch.testing.assert_close(got.sum(1), got.new_ones(len(q)))
    return got


@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize(("M", "N"), [(19, 37), (1, 37), (19, 1), (2 * QUERIES + 3, 5)])
def test_equals_column_means_of_the_map(G, M, N):
    check(*queries_and_keys(G, M, N))
    check(*queries_and_keys(G, M, N), scale=0.7, **masks(M, N))


def padded(q, k, mask, query_mask):
    """Fill masked entries with NaN."""
    q = q.masked_fill(~query_mask[:, None, :, None], torch.nan)
    return q, k.masked_fill(~mask[:, None, :, None], torch.nan)


def test_masked_keys_and_queries_do_not_count():
    (q, k), options = queries_and_keys(), masks()
    got = check(q, k, **options)
    assert not got[~options["mask"]].any()
    again = elip_kernels.attention_column_mean(*padded(q, k, **options), **options)
    assert torch.equal(again, got)


@pytest.mark.parametrize("name", ["mask", "query_mask"])
def test_an_image_without_a_key_or_a_query_is_nan(name):
    (q, k), options = queries_and_keys(), masks()
    right = elip_kernels.attention_column_mean(q, k, **options)
    options[name][1] = False
    got = elip_kernels.attention_column_mean(q, k, **options)
    assert torch.equal(got[0], right[0]) and got[1].isnan().all()


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_pytorch_form_makes_no_map():
    q, k = queries_and_keys(2, M=5 * QUERIES, N=2 * QUERIES)
    with Largest() as largest:
        column_mean_reference(q, k, None, None, 0.3)
    assert largest.elements == B * H * QUERIES * 2 * QUERIES
