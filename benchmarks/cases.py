"""Shapes that are timed at each scale, and copies of inputs that do not fit into the cache.

smallest   one small shape per benchmark, as in the slow tests (`--smallest`)
default    `pytest benchmarks/ --benchmark-only`: at most ten minutes on two CPU cores
full       every shape (`--full`)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from elip_kernels.testing import Case

Scale = Literal["smallest", "default", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BATCHES = (1, 16, 64, 256) if ON_GPU else (1, 8, 64)
WIDTH, HEADS = 768, 12
SWEEP = (257, WIDTH, 166)  # N, D and K of the cases at every batch and dtype
FURTHER = ((197, WIDTH, 127), (50, WIDTH, 32))
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
MAIN_DTYPE, OTHER_DTYPE = reversed(DTYPE_NAMES) if ON_GPU else DTYPE_NAMES
COMPILED = [Case(BATCHES[-1], *SWEEP, MAIN_DTYPE)]  # compiling takes long


def sweep(scale: Scale) -> list[Case]:
    """Return one shape at two batch sizes; in full at all batch sizes and dtypes."""
    if scale == "smallest":
        return [Case(2, *FURTHER[-1], MAIN_DTYPE)]
    if scale == "default":
        return [Case(B, *SWEEP, MAIN_DTYPE) for B in (BATCHES[0], BATCHES[-1 if ON_GPU else 1])]
    main = [Case(B, *SWEEP, MAIN_DTYPE) for B in BATCHES]
    return [*main, Case(BATCHES[-2], *SWEEP, OTHER_DTYPE)]


def reduce_cases(scale: Scale) -> list[Case]:
    """Return the sweep; the full scale has further real shapes at the largest batch."""
    further = [Case(BATCHES[-1], *shape, MAIN_DTYPE) for shape in FURTHER]
    return sweep(scale) + (further if scale == "full" else [])


def directions(scale: Scale) -> list[str]:
    """Return forward and backward; the full scale adds both as one training step."""
    both = ["forward", "backward"]
    return [*both, "training"] if scale == "full" else both


def described(case: Case, **more: int) -> dict[str, Any]:
    """Return shape and dtype of a case for the JSON; `more` replaces K."""
    names = "BND" if more else "BNDK"
    shape = {name: getattr(case, name) for name in names} | more
    return {"shape": shape, "dtype": DTYPE_NAMES[case.dtype]}


@dataclass(frozen=True)
class TowerCase:
    """A timm tower with B images of `size` × `size` pixels."""

    name: str
    size: int
    B: int
    dtype: torch.dtype

    def __str__(self) -> str:
        short = self.name.removeprefix("vit_").removesuffix("_patch16_224")
        return f"{short}-{self.size}px-B{self.B}-{DTYPE_NAMES[self.dtype]}"


def tower_cases(scale: Scale) -> list[TowerCase]:
    """Return ViT-B/16 at 256 px, as in ALBEF, and ViT-S/16 at 224 px, as in the small CLIP."""
    base, small = ("vit_base_patch16_224", 256), ("vit_small_patch16_224", 224)
    if scale == "smallest":
        return [TowerCase("vit_tiny_patch16_224", 96, 1, MAIN_DTYPE)]
    if ON_GPU:
        sizes = [*((B, MAIN_DTYPE) for B in BATCHES), (64, OTHER_DTYPE)]
        return [TowerCase(*tower, *size) for tower in (base, small) for size in sizes]
    if scale == "default":
        return [TowerCase(*small, 2, MAIN_DTYPE)]
    light = [TowerCase(*small, B, dtype) for dtype in DTYPE_NAMES for B in (1, 4)]
    return [TowerCase(*base, 1, MAIN_DTYPE), *light]


@dataclass(frozen=True)
class PretrainingCase:
    """A model of `list_models`, fields of its config, and a batch of B pairs."""

    model: str
    fields: dict[str, Any]
    B: int
    dtype: torch.dtype


def pretraining_case(family: str, scale: Scale) -> PretrainingCase:
    """Return the paper's size and batch on a GPU, and a narrow model with four pairs on a CPU."""
    if scale == "smallest":
        shallow = {"vision_depth": 6, "schedule": "2(100%) 2(75%) 2(40%)"}
        return PretrainingCase(f"{family}_tiny", shallow, 2, MAIN_DTYPE)
    name = "clip_vit_b16" if family == "clip" else family
    if ON_GPU:
        return PretrainingCase(name, {}, 36, MAIN_DTYPE)
    width = 192 if scale == "full" else 96
    fields: dict[str, Any] = {"vocab_size": 7632}
    fields |= {f"{part}_width": width for part in ("vision", "text")}
    fields |= {f"{part}_heads": 3 for part in ("vision", "text")}
    match family:
        case "clip":
            fields |= {"eos_token_id": 7631, "embed_dim": 64}
        case "meter":
            fields |= {"text_hidden": 4 * width}
            fields |= {"cross_width": width, "cross_heads": 3, "cross_hidden": 4 * width}
        case "blip":
            fields |= {"decoder_token_id": 7630, "encoder_token_id": 7631}
    if family in ("albef", "blip"):
        fields |= {"text_hidden": 4 * width, "embed_dim": 64, "queue_size": 4096}
    return PretrainingCase(name, fields, 4, MAIN_DTYPE)


def copies(inputs: tuple[Tensor, ...], read: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return `inputs` and, on a GPU, copies of them, so that no call finds its inputs in the cache.

    Args:
        inputs: Inputs of one call.
        read: Those that a call reads; all copies together are twice the size of the L2 cache.
    """
    count = 1
    if ON_GPU:
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        count = ceil(2 * cache / sum(tensor.nbytes for tensor in read))
    more = [tuple(_again(tensor) for tensor in inputs) for _ in range(count - 1)]
    return [inputs, *more]


def _again(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
