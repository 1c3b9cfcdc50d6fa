"""Write the table of supported models in models.md: which strategies work on which model.

python docs/supported.py             # rewrite the block between the two markers
python docs/supported.py --check     # exit status 1 if the block is stale

The script builds every model on the meta device and checks every strategy on it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from torch import nn

from benchmarks.marked_block import Block, run
from elip_models.analysis.supported_models import check_strategies
from elip_models.saving.open_model import open_model
from elip_models.strategies import STRATEGIES
from elip_models.vlm.strategy_list import reason_of

PAGE = Path(__file__).with_name("models.md")


def named(spec: str) -> Callable[[], nn.Module]:
    """Return a function that creates a model by its name in its library."""
    return lambda: open_model(spec, pretrained=False)


def configured(model: str, config: str) -> Callable[[], nn.Module]:
    """Return a function that creates a transformers model with its default config."""
    return lambda: getattr(transformers, model)(getattr(transformers, config)())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm ViT (`vit_base_patch16_224`)": named("timm:vit_base_patch16_224"),
    "timm CLIP ViT (`vit_base_patch16_clip_224`)": named("timm:vit_base_patch16_clip_224"),
    "timm DeiT, distilled": named("timm:deit_base_distilled_patch16_224"),
    "timm ViT with registers (DINOv2)": named("timm:vit_base_patch14_reg4_dinov2"),
    "timm ViT with q/k norm": lambda: timm.models.VisionTransformer(qk_norm=True),
    "timm EVA-02 of CLIP (rotary)": named("timm:eva02_base_patch16_clip_224"),
    "timm rotary ViT (`vit_small_patch16_rope_224`)": lambda: timm.create_model(
        "vit_small_patch16_rope_224", global_pool="token"
    ),
    "timm EVA-02, average pooling": named("timm:eva02_base_patch14_224"),
    "timm ViT, average pooling, no CLS (`vit_base_patch16_gap_224`)": named(
        "timm:vit_base_patch16_gap_224"
    ),
    "timm SigLIP (attention pooling, no CLS)": named("timm:vit_base_patch16_siglip_224"),
    "timm Perception Encoder": named("timm:vit_pe_core_base_patch16_224"),
    "timm DINOv3 (rotary, registers)": named("timm:vit_small_patch16_dinov3"),
    "timm ViTamin, hybrids": named("timm:vitamin_small_224"),
    "timm ViT, parallel blocks": named("timm:vit_small_patch16_18x2_224"),
    "timm ViT, post-norm": named("timm:vit_base_patch16_rpn_224"),
    "timm BEiT": named("timm:beit_base_patch16_224"),
    "timm NaFlex (padded patches)": named("timm:naflexvit_base_patch16_map"),
    "timm CaiT": named("timm:cait_xxs24_224"),
    "timm Swin": named("timm:swin_base_patch4_window7_224"),
    "open_clip CLIP, whole (`ViT-B-16`)": named("open_clip:ViT-B-16"),
    "open_clip image tower": lambda: open_model("open_clip:ViT-B-16", pretrained=False).visual,
    "open_clip CoCa, whole; no text guides it": named("open_clip:coca_ViT-B-32"),
    "open_clip SigLIP, whole (a trunk of timm)": named("open_clip:ViT-B-16-SigLIP"),
    "open_clip EVA-02, whole (a trunk of timm)": named("open_clip:EVA02-B-16"),
    "open_clip ConvNeXt (a trunk of timm)": named("open_clip:convnext_base"),
    "open_clip ResNet": lambda: open_model("open_clip:RN50", pretrained=False).visual,
    "transformers `CLIPModel`, whole": configured("CLIPModel", "CLIPConfig"),
    "transformers `CLIPVisionModel`": configured("CLIPVisionModel", "CLIPVisionConfig"),
    "transformers `ViTModel`": configured("ViTModel", "ViTConfig"),
    "transformers `DeiTModel`": configured("DeiTModel", "DeiTConfig"),
    "transformers `BlipVisionModel`": configured("BlipVisionModel", "BlipVisionConfig"),
    "transformers `BlipForImageTextRetrieval`, whole": configured(
        "BlipForImageTextRetrieval", "BlipConfig"
    ),
    "transformers `SiglipModel`, whole": configured("SiglipModel", "SiglipConfig"),
    "transformers `SiglipVisionModel`": configured("SiglipVisionModel", "SiglipVisionConfig"),
    "transformers `Dinov2Model`": configured("Dinov2Model", "Dinov2Config"),
    "transformers `Dinov2WithRegistersModel`": configured(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"
    ),
    "transformers `Dinov2ForImageClassification`": configured(
        "Dinov2ForImageClassification", "Dinov2Config"
    ),
    "transformers `Dinov2Backbone`": configured("Dinov2Backbone", "Dinov2Config"),
    "transformers `DINOv3ViTModel` (rotary, registers)": configured(
        "DINOv3ViTModel", "DINOv3ViTConfig"
    ),
    "transformers `CLIPForImageClassification`": configured(
        "CLIPForImageClassification", "CLIPConfig"
    ),
    "transformers `SiglipForImageClassification`": configured(
        "SiglipForImageClassification", "SiglipConfig"
    ),
    "transformers `Siglip2VisionModel` (padded patches)": configured(
        "Siglip2VisionModel", "Siglip2VisionConfig"
    ),
    "transformers `Data2VecVisionModel`": configured("Data2VecVisionModel", "Data2VecVisionConfig"),
    "transformers `MLCDVisionModel` (rotary)": configured("MLCDVisionModel", "MLCDVisionConfig"),
    "transformers `VivitModel` (video)": configured("VivitModel", "VivitConfig"),
    "transformers `VideoMAEModel` (video)": configured("VideoMAEModel", "VideoMAEConfig"),
    "transformers `VJEPA2ForVideoClassification` (video, rotary)": configured(
        "VJEPA2ForVideoClassification", "VJEPA2Config"
    ),
    "transformers Swin": configured("SwinModel", "SwinConfig"),
    "transformers `ViTMAEModel`": configured("ViTMAEModel", "ViTMAEConfig"),
    "transformers `TimesformerModel`": configured("TimesformerModel", "TimesformerConfig"),
}


def block() -> str:
    """Return the table, its notes, and the list of unsupported models."""
    lines = [
        f"| model | {' | '.join(f'`{name}`' for name in STRATEGIES)} |",
        f"| --- |{' :-: |' * len(STRATEGIES)}",
    ]
    notes, unsupported = [], []
    for label, make in MODELS.items():
        with torch.device("meta"):
            model = make()
        try:
            reasons = check_strategies(model)
        except TypeError as error:
            unsupported.append(f"- {label}: {reason_of(error)}.")
            continue
        cells = []
        for name, reason in reasons.items():
            note = f"`{name}`: {reason}."
            if reason is not None and note not in notes:
                notes.append(note)
            cells.append("yes" if reason is None else f"no ({notes.index(note) + 1})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    unsupported = ["Not supported, with the reason that the error gives:", "", *unsupported]
    return "\n".join([*lines, "", *numbered, "", *unsupported])


def blocks() -> list[Block]:
    """Return the table of strategies and models."""
    logging.getLogger().setLevel(logging.ERROR)  # hides warnings about weights that are not loaded
    return [Block(PAGE, "supported", block())]


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a page has no markers, or is stale under --check."""
    return run(blocks, "python docs/supported.py", __doc__, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
