"""The attention that patches receive in the image tower of a multimodal language model."""

from typing import Any

import torch
from torch import Tensor, nn

from elip_kernels import attention_column_mean, cls_attention
from elip_models.vlm.attention_probe import Watcher, unwatch, watch
from elip_models.vlm.call import current_call
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import find_runs

CLASS_TOKENS = ("class_embedding", "cls_token")


class TowerAttention(Watcher):
    """Stores the attention of the tower's layer whose features the model takes."""

    def __init__(self, multimodal: Multimodal) -> None:
        names = (name.rpartition(".")[2] for name, _ in multimodal.tower.named_parameters())
        self.has_class_token = not {*names}.isdisjoint(CLASS_TOKENS)

    def install(self, multimodal: Multimodal) -> None:
        """Watch the layer."""
        watch(attention_of(multimodal), self)
        if multimodal.head is not None:  # generate leaves the tower to the forward pass
            multimodal.head._supports_mm_encoder_outputs = _no_encoder_outputs

    @staticmethod
    def uninstall(multimodal: Multimodal) -> None:
        """Undo `install`."""
        vars(multimodal.head or multimodal.model).pop("_supports_mm_encoder_outputs", None)
        for module in multimodal.tower.modules():
            unwatch(module)

    def receive(
        self, query: Tensor, key: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        """Store what the patches receive, and their keys, mean over heads."""
        call = current_call()
        if call is None:
            return
        if self.has_class_token:
            received = cls_attention(query[:, :, 0], key, scale=scale)
        else:
            received = attention_column_mean(query, key, scale=scale)
        first = int(self.has_class_token)
        call.tower.append((received[:, first:], key.mean(1)[:, first:]))


def tower_attention(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the attention (R, n) and keys (R, n, d) of the images of this forward pass.

    Raises:
        ValueError: the runs of image tokens are not the patches of one image each.
    """
    images = current_call().tower
    if len(images) != 1 or images[0][0].shape != (rows, tokens):
        got = " and ".join(f"{len(row)} of {row.shape[1]} patches" for row, _ in images)
        raise ValueError(
            "strategy: expected images whose patches are the image tokens of the prompt, with text "
            f"between them, for 'visionzip', got {rows} runs of {tokens} image tokens for "
            f"{got or 'no images'}; take another strategy, such as 'diverse'"
        )
    return images[0]


def refuse_repeated(ids: Tensor | None, images: Tensor, pixels: Any) -> None:
    """Raise ValueError if `generate` has repeated images for sequences that have several.

    Two sequences of one prompt get the images 1 1 2 2, and need 1 2 1 2.

    Args:
        ids: (B, N), or None.
        images: (B, N) bool, the image tokens.
        pixels: the argument `pixel_values`.
    """
    counts = find_runs(images)[0].bincount(minlength=len(images))
    row = int((counts > 1).to(torch.uint8).argmax())
    first = int(counts[:row].sum())
    if ids is None or not isinstance(pixels, Tensor) or counts[row] < 2 or row + 1 == len(ids):
        return
    if torch.equal(ids[row], ids[row + 1]) and torch.equal(pixels[first], pixels[first + 1]):
        raise ValueError(
            "num_beams, num_return_sequences: expected 1 for 'visionzip' and prompts of several "
            "images, which generate would mix up, got more sequences for a prompt; take another "
            "strategy, such as 'diverse'"
        )


def attention_of(multimodal: Multimodal) -> nn.Module | None:
    """Return the attention of the layer of the image tower whose features the model takes.

    It is None if the tower's attention cannot be read.
    """
    layer = getattr(multimodal.config, "vision_feature_layer", -1)
    lists = (part for part in multimodal.tower.modules() if isinstance(part, nn.ModuleList))
    layers = next((blocks for blocks in lists if hasattr(blocks[0], "self_attn")), None)
    if layers is None or not isinstance(layer, int) or not hasattr(layers[0].self_attn, "config"):
        return None
    return layers[layer if layer < 0 else layer - 1].self_attn


def _no_encoder_outputs() -> bool:
    return False
