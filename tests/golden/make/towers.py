"""Make the `elip_*` cases: the four official image towers with ELIP's reduction.

Run: python -m tests.golden.make.towers CHECKOUT_OF_ELIP elip_albef
"""

import importlib
import sys
from pathlib import Path

import torch

from tests.golden.make.common import (
    draw_weights_,
    first_seed,
    gradients,
    package,
    randn,
    recorded_sorts,
    save,
    stage_tensors,
    stub,
    use_plain_layer_norm_,
    weighted_sum,
    weights,
)

SIZES = {"image": 32, "patch": 4, "embed_dim": 32, "heads": 2, "depth": 12, "mlp_ratio": 1}
NARROW = {"embed_dim": 16}
ALBEF_STAGES = {
    "begin_layer": [2, 4, 10],
    "num_act_layers": [2, 6, 2],
    "num_keep_tokens": [int(64 * ratio) for ratio in (0.9, 0.65, 0.4)],
}
OPENCLIP_STAGES = ALBEF_STAGES | {"num_keep_tokens": [int(65 * r) for r in (0.9, 0.65, 0.4)]}
METER_STAGES = {
    "begin_layer": [2, 4, 9],
    "num_act_layers": [2, 5, 2],
    "num_keep_tokens": [int(64 * ratio) for ratio in (0.9, 0.7, 0.45)],
}
CASES = {  # official file, sizes, stages
    "elip_albef": ("ALBEF/models/vit.py", SIZES, ALBEF_STAGES),
    "elip_blip": ("BLIP/models/vit.py", SIZES | {"mlp_ratio": 2}, ALBEF_STAGES),
    "elip_meter": (
        "METER/meter/modules/clip_model_vl_pruning.py",
        SIZES | NARROW | {"depth": 11, "mlp_ratio": 4},
        METER_STAGES,
    ),
    "elip_openclip": ("CLIP/src/open_clip/transformer.py", SIZES | NARROW, OPENCLIP_STAGES),
}
OUTPUT_DIM = 32  # of open_clip's projection


def build(case, root):
    """Return the official tower of a case, and a function that returns its outputs."""
    file, sizes, stages = CASES[case]
    path = Path(root) / file
    stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    package("official", path.parent)
    module = importlib.import_module(f"official.{path.stem}")
    shape = sizes["image"], sizes["patch"], sizes["embed_dim"]
    if case == "elip_meter":
        image, patch, width = shape
        tower = module.VisualTransformer(
            *(image, patch, width, sizes["depth"] + 1, sizes["heads"], width, image), stages
        )
        return tower, lambda image, text: {"out": tower(image, None, text_cls=text)}
    if case == "elip_openclip":
        tower = module.VisionTransformer(
            *(*shape, sizes["depth"], sizes["heads"], sizes["mlp_ratio"]),
            output_dim=OUTPUT_DIM,
            output_tokens=True,
        )
        tower.prune_state = stages
        names = "out_pooled", "out_tokens"
        return tower, lambda image, text: dict(zip(names, tower(image, text), strict=True))
    tower = module.VisionTransformer(
        *(shape[0], shape[1], 3, 0, shape[2], sizes["depth"], sizes["heads"], sizes["mlp_ratio"]),
        prune_state=stages,
    )
    return tower, lambda image, text: {"out": tower(image, text_cls=text)}


def record(case, root, seed, *, dtype=torch.float32, swap_texts=False):
    """Run the official tower forward and backward, and return the tensors and the margins."""
    _, sizes, stages = CASES[case]
    tower, run = build(case, root)
    draw_weights_(tower, seed)
    before = weights(tower)
    tower.to(dtype)
    if case == "elip_meter" and dtype == torch.float64:
        use_plain_layer_norm_(tower)
    image = randn(3, 3, sizes["image"], sizes["image"], seed=seed + 1000)
    text = randn(3, OUTPUT_DIM if case == "elip_openclip" else sizes["embed_dim"], seed=seed + 2000)
    if case == "elip_openclip":
        text = torch.nn.functional.normalize(text, dim=1)
    leaf = image.to(dtype, copy=True).requires_grad_()
    with recorded_sorts() as sorts:
        outputs = run(leaf, (text.roll(1, 0) if swap_texts else text).to(dtype))
    loss, upstream = weighted_sum(outputs, seed + 3000)
    loss.backward()
    stage, margins = stage_tensors(sorts, stages["num_keep_tokens"])
    tensors = {"image": image, "text_cls": text} | before | upstream | outputs | stage
    return tensors | gradients(tower, image=leaf), margins


def main(root, case):
    """Make one case, and check that a float64 run keeps the same tokens."""
    torch.set_num_threads(1)
    file, sizes, stages = CASES[case]
    seed, tensors, margins = first_seed(lambda seed: record(case, root, seed))
    other, _ = record(case, root, seed, swap_texts=True)
    kept = [f"stage{s}/keep_idx" for s in range(3)]
    moved = [(tensors[key] != other[key]).any(1).sum().item() for key in kept]
    assert min(moved) > 0, "the text must matter in every stage"
    double, _ = record(case, root, seed, dtype=torch.float64)
    assert all(torch.equal(tensors[key], double[key]) for key in kept)
    out = "out_tokens" if case == "elip_openclip" else "out"
    difference = (tensors[out] - double[out]).abs().max().item()
    config = sizes | {"batch": 3, "prune_state": stages, "lambda": 0.8}
    facts = {"seed": seed, "margins": margins, "largest_difference_from_float64": difference}
    facts["images_that_another_text_changes"] = moved
    save(case, tensors, source="ELIP", root=root, files=[file], config=config, **facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
