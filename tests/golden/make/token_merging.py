"""Make the cases `evit`, `tome` and `tome_functions` from the official implementations.

Run: python -m tests.golden.make.token_merging evit CHECKOUT_OF_EVIT
     python -m tests.golden.make.token_merging tome CHECKOUT_OF_TOME
"""

import importlib
import sys
from inspect import getclosurevars
from unittest import mock

import timm
import torch

from tests.golden.make.common import (
    LEAST_MARGIN,
    draw_weights_,
    first_seed,
    gradients,
    randn,
    save,
    stub,
    weighted_sum,
    weights,
)

SIZES = {"image": 32, "patch": 4, "embed_dim": 16, "heads": 2, "depth": 12, "mlp_ratio": 1}
NUM_CLASSES = 10
KEEP_RATES = [0.7 if i in (3, 6, 9) else 1 for i in range(12)]
RUNS = {"r4": (4, True), "r8": (8, True), "r8_noprop": (8, False)}  # r, proportional attention
METRIC_BLOCKS = (0, 1, 11)
LEAST_COSINE_GAP = 7e-4
LEAST_ORDER_GAP = 4e-4  # relative gap of kept neighbours, as EViT keeps score order
FUNCTIONS = [  # batch, tokens, metric channels, r, class token
    (2, 17, 8, 3, True),
    (2, 16, 8, 5, False),
    (3, 50, 16, 24, True),
    (1, 50, 16, 40, True),
    (2, 9, 4, 1, False),
]


def image_of(seed):
    """Return the images of a seed."""
    return randn(3, 3, SIZES["image"], SIZES["image"], seed=seed + 1000)


def outputs_of(model, run, seed, dtype):
    """Run forward and backward, and return outputs, weights of the loss and gradients."""
    leaf = image_of(seed).to(dtype).requires_grad_()
    final = []
    handle = model.norm.register_forward_hook(lambda module, args, out: final.append(out))
    logits = run(leaf)
    handle.remove()
    outputs = {"logits": logits, "out_tokens": final[0]}
    loss, upstream = weighted_sum(outputs, seed + 3000)
    model.zero_grad()
    loss.backward()
    return outputs | upstream | gradients(model, image=leaf)


def record_evit(seed, dtype=torch.float32):
    """Run official EViT, and return the tensors and the least gaps of its scores."""
    stub("torchprofile", profile_macs=None)
    from evit import EViT

    model = EViT(
        *(SIZES["image"], SIZES["patch"], 3, NUM_CLASSES, SIZES["embed_dim"], SIZES["depth"]),
        *(SIZES["heads"], SIZES["mlp_ratio"]),
        keep_rate=KEEP_RATES,
        fuse_token=True,
    ).eval()
    draw_weights_(model, seed)
    tensors = weights(model) | {"image": image_of(seed)}
    model.to(dtype)
    seen = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(out))
    tensors |= outputs_of(model, model, seed, dtype)
    stages = [(idx, scores) for _, _, idx, scores, _ in seen if idx is not None]
    gaps, order_gaps = [], []
    for s, (idx, scores) in enumerate(stages):
        tensors |= {f"stage{s}/idx": idx, f"stage{s}/cls_attn": scores}
        ranked, keep = scores.sort(dim=1, descending=True)[0], idx.shape[1]
        gap = 1 - ranked[:, 1:] / ranked[:, :-1]
        gaps.append(gap[:, keep - 1].min().item())
        order_gaps.append(gap[:, : keep - 1].min().item())
    return tensors, [*gaps, min(order_gaps) * LEAST_MARGIN / LEAST_ORDER_GAP]


def make_evit(root):
    """Make `evit`, and check that a float64 run keeps the same tokens in the same order."""
    seed, tensors, margins = first_seed(record_evit)
    double, _ = record_evit(seed, torch.float64)
    assert all(torch.equal(tensors[f"stage{s}/idx"], double[f"stage{s}/idx"]) for s in range(3))
    config = SIZES | {"num_classes": NUM_CLASSES, "batch": 3, "keep_rate": KEEP_RATES}
    facts = {
        "seed": seed,
        "margins": margins[:3],
        "least_order_gap": margins[3] * LEAST_ORDER_GAP / LEAST_MARGIN,
    }
    save("evit", tensors, source="EViT", root=root, files=["evit.py"], config=config, **facts)


def cosine_gap(metric, r, class_token):
    """Return the least gap of cosine similarity that separates a choice of the matching.

    The choices are: which tokens merge, and the partner of each of them.
    """
    metric = torch.nn.functional.normalize(metric.detach(), dim=-1)
    scores = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2))[:, int(class_token) :]
    best = scores.sort(dim=2, descending=True)[0]
    ranked, order = best[..., 0].sort(dim=1, descending=True)
    gaps = []
    if r < ranked.shape[1]:
        gaps.append((ranked[:, r - 1] - ranked[:, r]).min().item())
    if best.shape[2] > 1:
        gaps.append((best[..., 0] - best[..., 1]).gather(1, order[:, :r]).min().item())
    return min(gaps, default=1.0)


def indices(metric, merge, unmerge):
    """Return the indices that the official matching chose; none if nothing merges."""
    found = getclosurevars(unmerge).nonlocals
    if not found:
        empty = torch.zeros(len(metric), 0, dtype=torch.long)
        return {"src_idx": empty, "dst_idx": empty}
    return {name: found[name].squeeze(-1) for name in ("unm_idx", "src_idx", "dst_idx")}


class RecordedMatching:
    """The official matching, with the indices and the similarity gaps of each call."""

    def __init__(self, matching):
        self.matching = matching
        self.calls = []
        self.gap = 1.0

    def __call__(self, metric, r, class_token, distill_token):
        merge, unmerge = self.matching(metric, r, class_token, distill_token)
        found = indices(metric, merge, unmerge)
        self.calls.append({"metric": metric.detach()} | found)
        if found["src_idx"].numel():
            gap = cosine_gap(metric, found["src_idx"].shape[1], class_token)
            self.gap = min(self.gap, gap)
        return merge, unmerge


def recording(function, results):
    """Return the function, which also appends each result to a list."""

    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


def record_tome(seed, dtype=torch.float32):
    """Run official ToMe with each setting, and return the tensors and the least gap."""
    patch = importlib.import_module("tome.patch.timm")
    model = timm.models.VisionTransformer(
        img_size=SIZES["image"],
        patch_size=SIZES["patch"],
        num_classes=NUM_CLASSES,
        embed_dim=SIZES["embed_dim"],
        depth=SIZES["depth"],
        num_heads=SIZES["heads"],
        mlp_ratio=SIZES["mlp_ratio"],
    ).eval()
    draw_weights_(model, seed)
    tensors = weights(model) | {"image": image_of(seed)}
    model.to(dtype)
    gaps = []
    for name, (r, proportional) in RUNS.items():
        patch.apply_patch(model, trace_source=True, prop_attn=proportional)
        model.r = r
        matching, merged = RecordedMatching(patch.bipartite_soft_matching), []
        merging = recording(patch.merge_wavg, merged)
        with mock.patch.multiple(patch, bipartite_soft_matching=matching, merge_wavg=merging):
            got = outputs_of(model, model, seed, dtype)
        if name == "r8_noprop":
            got = {k: t for k, t in got.items() if "grad/" not in k or k == "grad/image"}
        got["size_final"] = model._tome_info["size"]
        for block in METRIC_BLOCKS:
            got |= {f"block{block}/{key}": x for key, x in matching.calls[block].items()}
        got["block0/size"] = merged[0][1]
        tensors |= {f"{name}/{key}": tensor for key, tensor in got.items()}
        gaps.append(matching.gap)
        model.__class__ = timm.models.VisionTransformer
    return tensors, gaps


def make_tome(root):
    """Make `tome`, and check that a float64 run merges the same tokens."""
    seed, tensors, gaps = first_seed(record_tome, LEAST_COSINE_GAP)
    double, _ = record_tome(seed, torch.float64)
    for key in tensors:
        if key.endswith(("_idx", "size_final")):
            assert torch.equal(tensors[key], double[key].to(tensors[key].dtype)), key
    config = SIZES | {"num_classes": NUM_CLASSES, "batch": 3}
    facts = {
        "timm": timm.__version__,
        "seed": seed,
        "cosine_gaps": dict(zip(RUNS, gaps, strict=True)),
    }
    files = ["tome/patch/timm.py", "tome/merge.py"]
    save("tome", tensors, source="ToMe", root=root, files=files, config=config, **facts)


def record_functions(seed):
    """Run the official matching and merging functions on random tokens."""
    from tome.merge import bipartite_soft_matching, merge_source, merge_wavg

    tensors, cases, gaps = {}, [], []
    for k, (B, N, C, r, class_token) in enumerate(FUNCTIONS):
        first = 100 * seed + 10 * k
        metric, x = randn(B, N, C, seed=first), randn(B, N, 10, seed=first + 1).requires_grad_()
        size = 1 + 2 * randn(B, N, 1, seed=first + 2).abs().round()
        merge, unmerge = bipartite_soft_matching(metric, r, class_token)
        merged, size_out = merge_wavg(merge, x, size)
        upstream = randn(*merged.shape, seed=first + 3)
        (merged * upstream).sum().backward()
        found = indices(metric, merge, unmerge)
        got = {"metric": metric, "x": x, "size": size, "merged": merged, "size_out": size_out}
        got |= {"merged_size_none": merge_wavg(merge, x)[0], "source": merge_source(merge, x)}
        got |= {"upstream": upstream, "grad_x": x.grad, "unmerged": unmerge(merged)} | found
        tensors |= {f"fn{k}/{key}": tensor for key, tensor in got.items()}
        cases.append({"r_requested": r, "class_token": class_token, "N_out": merged.shape[1]})
        gaps.append(cosine_gap(metric, found["src_idx"].shape[1], class_token))
    tensors["cases"] = cases
    return tensors, gaps


def make_functions(root):
    """Make `tome_functions`."""
    seed, tensors, gaps = first_seed(record_functions, LEAST_COSINE_GAP)
    facts = {"seed": seed, "cosine_gaps": gaps, "cases": tensors.pop("cases")}
    save("tome_functions", tensors, source="ToMe", root=root, files=["tome/merge.py"], **facts)


def main(name, root):
    """Make the cases of one official implementation."""
    torch.set_num_threads(1)
    sys.path.insert(0, root)
    if name == "evit":
        make_evit(root)
    else:
        make_tome(root)
        make_functions(root)


if __name__ == "__main__":
    main(*sys.argv[1:])
