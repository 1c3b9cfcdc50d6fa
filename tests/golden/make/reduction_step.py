"""Make the case `elip_reduce_only`: ELIP's reduction for given scores.

The official forward of the ALBEF tower runs unchanged. Its blocks are stand-ins that return the
tokens as they are, and the given scores as attention.

Run: python -m tests.golden.make.reduction_step CHECKOUT_OF_ELIP
"""

import importlib
import sys
from functools import partialmethod
from pathlib import Path
from unittest import mock

import torch

from tests.golden.make.common import exact_in_half, package, recorded_sorts, save

D = 16
F32, BF16 = torch.float32, torch.bfloat16
FILE = "ALBEF/models/vit.py"


def softmax(noise, keep):
    """Return the scores of a sharp softmax."""
    return (2 * noise).softmax(1)


def flat(noise, keep):
    """Return scores so close that bfloat16 rounds many of them to the same value."""
    return (0.1 * noise).softmax(1)


def levels(noise, keep):
    """Return scores with few distinct values, so that the boundary is a tie."""
    ranks = noise.argsort(1).argsort(1)
    return (1 + ranks // 6) / 128


def two_levels(noise, keep):
    """Return one score for the tokens that are kept, and a lower one for the others."""
    ranks = noise.argsort(1, descending=True).argsort(1)
    return torch.where(ranks < keep, 3 / 128, 1 / 128)


def equal(noise, keep):
    """Return the same score for every token."""
    return torch.full_like(noise, 1 / 64)


def tiny(noise, keep):
    """Return scores whose pruned part sums to about 1e-6."""
    return torch.where(two_levels(noise, keep) > 2 / 128, 0.04, 1e-7) * (1 + noise.sigmoid())


def zero(noise, keep):
    """Return scores whose pruned part is 0."""
    return torch.where(two_levels(noise, keep) > 2 / 128, 0.04 * (1 + noise.sigmoid()), 0.0)


CASES = {  # batch, patches, kept, dtype of tokens, dtype of scores, scores
    "00_base": (3, 64, 57, F32, F32, softmax),
    "01_keep_n_minus_1": (2, 49, 48, F32, F32, softmax),
    "02_keep_1": (2, 49, 1, F32, F32, softmax),
    "03_odd_n": (4, 37, 20, F32, F32, softmax),
    "04_n196": (1, 196, 127, F32, F32, softmax),
    "05_ties_boundary": (2, 33, 20, F32, F32, levels),
    "06_ties_harmless": (2, 33, 20, F32, F32, two_levels),
    "07_all_equal": (2, 64, 32, F32, F32, equal),
    "08_tiny_mass": (2, 33, 25, F32, F32, tiny),
    "09_zero_mass": (2, 33, 30, F32, F32, zero),
    "10_bf16": (3, 64, 41, BF16, BF16, softmax),
    "11_bf16_tokens_f32_attn": (2, 50, 30, BF16, F32, softmax),
    "12_bf16_keep_n_minus_1": (2, 37, 36, BF16, BF16, softmax),
    "13_keep_all": (2, 20, 20, F32, F32, softmax),
    "14_keep_more_than_n": (2, 20, 25, F32, F32, softmax),
    "15_bf16_ties_boundary": (2, 196, 127, BF16, BF16, flat),
}


class StandInBlock(torch.nn.Module):
    """A block that returns the tokens as they are, and given scores as the attention of CLS."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.nn.functional.pad(scores, (1, 0))[:, None, None]

    def forward(self, x, register_hook=False, out_attn=False):
        return (x, self.scores) if out_attn else x


def reduced(module, tokens, scores, keep):
    """Return the output of the official forward, and the positions that it keeps."""
    stages = {"begin_layer": [0], "num_act_layers": [1], "num_keep_tokens": [keep]}
    tower = module.VisionTransformer(4, 4, 3, 0, D, 1, 1, prune_state=stages)
    del tower.cls_token, tower.pos_embed
    tower.cls_token, tower.pos_embed = tokens[:, :1], torch.zeros_like(tokens[:1])
    tower.patch_embed = tower.norm = torch.nn.Identity()
    tower.blocks = torch.nn.ModuleList([StandInBlock(scores)])
    with recorded_sorts() as sorts:
        out = tower(tokens[:, 1:], text_cls=torch.zeros_like(tokens[:, 0]))
    kept = sorts[0][2][:, :keep].sort(dim=1)[0] + 1
    return out, torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)


def main(root):
    """Run every case in float32 with a stable sort, whatever the dtypes of its inputs are."""
    torch.set_num_threads(1)
    package("official", Path(root) / "ALBEF/models")
    module = importlib.import_module("official.vit")
    stable = partialmethod(torch.Tensor.sort, stable=True)
    tensors, cases = {}, []
    for k, (key, (B, n, keep, dtype, score_dtype, scores_of)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(k)
        tokens = exact_in_half(torch.randn(B, n + 1, D, generator=generator)).to(dtype)
        noise = torch.randn(B, n, generator=generator)
        scores = scores_of(noise, keep).to(score_dtype)
        upstream = torch.randn(B, min(keep, n) + 2, D, generator=generator)
        upstream = exact_in_half(upstream).to(dtype)
        leaf = tokens.float().requires_grad_()
        with mock.patch.object(torch.Tensor, "sort", stable):
            out, kept = reduced(module, leaf, scores.float(), keep)
        (out * upstream.float()).sum().backward()
        got = {"tokens": tokens, "attn": scores, "upstream": upstream}
        got |= {"out": out, "keep_idx": kept, "grad_tokens": leaf.grad}
        tensors |= {f"{key}/{name}": tensor for name, tensor in got.items()}
        cases.append({"key": f"{key}/", "keep": keep})
    save("elip_reduce_only", tensors, source="ELIP", root=root, files=[FILE], cases=cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
