"""Examples of the ops that have kernels, and functions of tensors for cases that examples lack.

Sizes are those of a ViT-B. In these functions counts (kept tokens, merged pairs) follow from the
rows of `grad_out`, so that a list of tensors is a whole call: it can be moved to a device or
widened to fp64.
"""

import os
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

import elip_kernels
from elip_kernels import launch
from elip_kernels._example import EXAMPLES, Sizes, map_tensors
from elip_kernels._operator import OPERATORS
from elip_kernels.testing import WITH_KERNELS

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not IS_INTERPRETED


def pick(full, small):
    """Return `full` on a GPU, or `small` if the interpreter runs the kernels."""
    return full if ON_GPU else small


WIDTH, HEADS = pick((768, 12), (64, 1))
GROUPED = pick((12, 4), (2, 1))  # heads of queries, of keys
TOKENS = pick(257, 19)
REAL = pick((197, 257, 577), (TOKENS,))
HALF = pick(torch.bfloat16, torch.float16)  # the interpreter truncates to bf16
DTYPES = pick((torch.float32, torch.bfloat16, torch.float16), (torch.float32, HALF))


OPS = {name: EXAMPLES[name] for name in WITH_KERNELS}


def example(name, device, B, N=TOKENS, dtype=HALF):
    """Return arguments of an op on a device, 65% of the candidates kept."""
    arguments = OPS[name].arguments(Sizes(B, N, WIDTH, int(0.65 * (N - 1)), HEADS, dtype))
    return map_tensors(lambda tensor: tensor.to(device), arguments)


def reduce_inputs(B, N, dtype, D=WIDTH, keep=0.65):
    """Return tokens, scores, grad_out."""
    K = max(1, int(keep * (N - 1)))
    tokens, grad_out = torch.randn(B, N, D), torch.randn(B, K + 2, D)
    return tokens.to(dtype), torch.randn(B, N).softmax(1)[:, 1:], grad_out.to(dtype)


def reduce(tokens, scores, grad_out, **options):
    """Return out, kept, weights, gradient."""
    leaf = tokens.detach().requires_grad_()
    rest = options.get("num_prefix_tokens", 1) + options.get("merge", True)
    keep = grad_out.shape[1] - rest
    out, info = elip_kernels.reduce(leaf, scores, keep, return_info=True, **options)
    (gradient,) = torch.autograd.grad(out, leaf, grad_out)
    return out.detach(), info.kept, info.weights, gradient


def block_inputs(B, N, dtype, D=WIDTH, mean=0.0):
    """Return tokens, cls, and norm, query and key parameters of a pre-norm block."""
    tokens, cls = mean + torch.randn(B, N, D), torch.randn(B, D)
    norm = 1 + 0.1 * torch.randn(D), torch.randn(D)
    query = torch.randn(D, D) / D**0.5, torch.randn(D)
    key = torch.randn(D, D) / D**0.5
    return [t.to(dtype) for t in (tokens, cls, *norm, *query, key)]


def named(norm_weight, norm_bias, q_weight, q_bias, k_weight, num_heads=None):
    """Return the block's parameters by argument name; heads of 64 channels by default."""
    num_heads = num_heads or len(q_weight) // 64
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": 1e-6}
    query = {"q_weight": q_weight, "q_bias": q_bias}
    return norm | query | {"k_weight": k_weight, "num_heads": num_heads}


def row_from_tokens(tokens, cls, *block, H=None):
    """Return the row."""
    return (elip_kernels.cls_attention_from_tokens(tokens, cls, **named(*block, H)),)


def cls_output_inputs(B, N, dtype, D=None, mean=0.0):
    """Return `block_inputs`, v_weight and v_bias."""
    D = D or WIDTH
    value = torch.randn(D, D) / D**0.5, torch.randn(D)
    return [*block_inputs(B, N, dtype, D, mean), *(t.to(dtype) for t in value)]


def cls_attention_output(tokens, cls, *block, H=None):
    """Return the output."""
    *block, v_weight, v_bias = block
    value = {"v_weight": v_weight, "v_bias": v_bias}
    return (elip_kernels.cls_attention_output(tokens, cls, **named(*block, H), **value),)


def score_reduce_inputs(B, N, dtype, D=WIDTH):
    """Return `block_inputs` and grad_out."""
    grad_out = torch.randn(B, int(0.65 * (N - 1)) + 2, D)
    return [*block_inputs(B, N, dtype, D), grad_out.to(dtype)]


def score_reduce(tokens, cls, *block, H=None):
    """Return out, kept, weights, row, gradient."""
    *block, grad_out = block
    leaf, keep = tokens.detach().requires_grad_(), grad_out.shape[1] - 2
    out, info, row = elip_kernels.score_reduce(
        leaf, cls, keep, return_info=True, **named(*block, H)
    )
    (gradient,) = torch.autograd.grad(out, leaf, grad_out)
    return out.detach(), info.kept, info.weights, row, gradient


def row_inputs(B, N, dtype, H=HEADS, d=WIDTH // HEADS):
    """Return q, k."""
    return torch.randn(B, H, d).to(dtype), torch.randn(B, H, N, d).to(dtype)


def row(q, k, mask=None):
    """Return the row."""
    return (elip_kernels.cls_attention(q, k, mask=mask),)


def column_mean_inputs(B, N, dtype, H=GROUPED[0], G=GROUPED[1], d=WIDTH // HEADS, M=None):
    """Return q, k, with several query heads per key head."""
    return torch.randn(B, H, M or N, d).to(dtype), torch.randn(B, G, N, d).to(dtype)


def attention_column_mean(q, k, mask=None, query_mask=None):
    """Return the column means."""
    return (elip_kernels.attention_column_mean(q, k, mask=mask, query_mask=query_mask),)


def bipartite_inputs(B, N, dtype, D=WIDTH, C=WIDTH // HEADS, r=0.25):
    """Return tokens, metric, size, penalty, grad_out; sizes are 1 to 5."""
    rows = N - max(1, int(r * N))
    tokens, metric, grad_out = torch.randn(B, N, D), torch.randn(B, N, C), torch.randn(B, rows, D)
    size, penalty = torch.randint(1, 6, (B, N)).float(), 3.0 * (torch.rand(B, N) < 0.3)
    return tokens.to(dtype), metric.to(dtype), size, penalty, grad_out.to(dtype)


def bipartite_merge(tokens, metric, size, penalty, grad_out):
    """Return merged, sizes, slots, gradient."""
    leaf = tokens.detach().requires_grad_()
    r, options = tokens.shape[1] - grad_out.shape[1], {"size": size, "penalty": penalty}
    merged, sizes, info = elip_kernels.bipartite_merge(leaf, metric, r, **options, return_info=True)
    (gradient,) = torch.autograd.grad(merged, leaf, grad_out)
    return merged.detach(), sizes, info.slots, gradient


def nearest_inputs(B, N, dtype, D=WIDTH, C=WIDTH // HEADS, share=0.5):
    """Return tokens, kept, metric, size, grad_out; sizes are 1 to 5."""
    tokens, metric, size, *_ = bipartite_inputs(B, N, dtype, D, C)
    kept = torch.rand(B, N - 1).topk(max(1, int(share * (N - 1)))).indices + 1
    return tokens, kept, metric, size, torch.randn(B, 1 + kept.shape[1], D).to(dtype)


def merge_nearest(tokens, kept, metric, size, grad_out):
    """Return merged, sizes, slots, gradient."""
    leaf = tokens.detach().requires_grad_()
    merged, sizes, info = elip_kernels.merge_nearest(
        leaf, kept, metric, size=size, return_info=True
    )
    (gradient,) = torch.autograd.grad(merged, leaf, grad_out)
    return merged.detach(), sizes, info.slots, gradient


def candidates(B, N, dtype, D=WIDTH):
    """Return tokens whose products are integers, and relevances that are far apart."""
    relevance = 1.1 ** -torch.stack([torch.randperm(N) for _ in range(B)]).float()
    return torch.randn(B, N, D).sign().to(dtype), relevance


def select_diverse(tokens, relevance, **options):
    """Return half of the positions, in the order of selection."""
    return (elip_kernels.select_diverse(tokens, 0.5, selection_order=True, **options),)


def select_dpp(tokens, relevance, **options):
    """Return half of the positions, in the order of selection."""
    options |= {"relevance": relevance, "selection_order": True}
    return (elip_kernels.select_dpp(tokens, 0.5, **options),)


@contextmanager
def kernels_alone():
    """Raise inside the block if a call on the device runs the PyTorch implementation."""
    refusal = AssertionError("the PyTorch implementation ran instead of a kernel")
    with ExitStack() as stack:
        for operator in OPERATORS.values():
            stack.enter_context(patch.object(operator, "reference", side_effect=refusal))
        yield


@contextmanager
def pytorch_forms():
    """Run the PyTorch implementation of every op inside the block, on any device."""
    with patch.object(launch, "unsupported", autospec=True, return_value="disabled by a test"):
        yield


def on(device, tensors):
    """Move tensors to a device; None stays None."""
    return [None if t is None else t.to(device) for t in tensors]


def widened(tensors):
    """Convert floating-point tensors to fp64, which no kernel supports."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_alike(outputs, expected):
    """Assert equal integers, and floats equal up to the order of a sum."""
    for ours, theirs in zip(outputs, expected, strict=True):
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        rtol = max(1e-5, 2 * torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=rtol)
