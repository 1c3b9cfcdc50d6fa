"""Every op refuses a tensor one size of which does not fit the others."""

import pytest
import torch

import elip_kernels
from elip_kernels._example import EXAMPLES, Sizes

B, N, D, K, H = 2, 10, 8, 6, 2
SIZES = Sizes(B=B, N=N, D=D, K=K, H=H, dtype=torch.float32)
MASK = {"mask": torch.ones(B, N, dtype=torch.bool)}
COUNTS = {"lengths": torch.full((B,), N), "merges": torch.full((B,), 2)}
CASES = [
    *((op, {}) for op in EXAMPLES),
    *((op, MASK) for op in ("reduce", "select_tokens", "cls_attention", "merge_nearest")),
    *((op, MASK) for op in ("select_diverse", "select_dpp", "attention_column_mean")),
    ("attention_column_mean", {"query_mask": MASK["mask"]}),
    *(("reduce", {"attn": torch.rand(shape)}) for shape in ((B, N - 1), (B, H, N), (B, H, N, N))),
    ("select_tokens", {"attn": torch.rand(B, H, N, N)}),
    ("score_reduce", {"text": torch.randn(B, D), "fusion": 0.5}),
    ("score_reduce", {"row": torch.rand(B, N)}),
    ("score_reduce", {"scored": torch.randn(B, N, D)}),
    ("bipartite_merge", {"r": 2} | COUNTS),
    ("select_diverse", {"first": torch.zeros(B).long()}),
]
WIDTH = {"tokens": {2}}
FREE = {
    "apply_merge": WIDTH,
    "attention_column_mean": {"q": {1, 2}, "k": {1, 2}},  # groups of heads; queries and keys
    "bipartite_merge": WIDTH | {"metric": {2}},
    "cls_attention": {"q": {1}, "k": {1, 2}},
    "cls_attention_from_tokens": {"tokens": {1}},
    "cls_attention_output": {"tokens": {1}},
    "fuse_text": {"tokens": {1}, "text": {0}},  # one text for all images
    "merge_nearest": WIDTH | {"metric": {2}, "kept": {1}},
    "reduce": {"tokens": {1, 2}, "attn": {1}},  # attn (B, N-1) too; heads
    "score_reduce": {"tokens": {1}, "text": {0}},
    "select_diverse": {"tokens": {0, 1, 2}},
    "select_dpp": WIDTH,
    "select_tokens": {"attn": {0, 1}},
    "unmerge": {"merged": {2}},
}
"""The sizes of an argument that may differ from those of the others, by dimension."""


def ids(case):
    return f"{case[0]}, {', '.join(case[1])}" if case[1] else case[0]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_size_that_does_not_fit_is_an_error(case):
    op, more = case
    function, arguments = EXAMPLES[op].function, EXAMPLES[op].arguments(SIZES) | more
    function(**arguments)
    for name, value in arguments.items():
        dims = range(value.dim()) if isinstance(value, torch.Tensor) else ()
        for dim in set(dims) - FREE[op].get(name, set()):
            length = value.shape[dim]
            for size in {1, length // 2, length + 1, 2 * length} - {0, length}:
                other = value.index_select(dim, torch.arange(size) % length)
                with pytest.raises((TypeError, ValueError), match=r"^\w+: expected .*, got "):
                    function(**arguments | {name: other})


def test_a_fusion_without_a_text_is_an_error():
    arguments = EXAMPLES["score_reduce"].arguments(SIZES)
    with pytest.raises(ValueError, match=r"^fusion: expected 1 without a text, got 0\.8 .*; pass"):
        elip_kernels.score_reduce(**arguments, fusion=0.8)
