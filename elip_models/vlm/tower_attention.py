"""The attention that patches receive in the image tower of a multimodal language model.

`generate` runs the tower before the forward pass, in which a strategy reads the attention. So the
attention belongs to the output of the tower, which the forward pass gets.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elip_kernels import attention_column_mean, cls_attention
from elip_models.call_context import put, take
from elip_models.engine.model_methods import keep_handles
from elip_models.vlm.attention_probe import Watcher, watch
from elip_models.vlm.call import current_call
from elip_models.vlm.families import Multimodal

CLASS_TOKENS = ("class_embedding", "cls_token")
NAME = "elip_attention"


class Received(NamedTuple):
    """The attention (R, n) that the patches of R images receive, and their keys (R, n, d)."""

    attention: Tensor
    keys: Tensor


class TowerAttention(Watcher):
    """Stores the attention of the tower's layer whose features the model takes."""

    def __init__(self, multimodal: Multimodal) -> None:
        names = (name.rpartition(".")[2] for name, _ in multimodal.tower.named_parameters())
        self.has_class_token = not {*names}.isdisjoint(CLASS_TOKENS)

    def install(self, multimodal: Multimodal) -> None:
        """Watch the layer, and the end of the tower."""
        watch(attention_of(multimodal), self)
        tower = multimodal.tower
        keep_handles(tower, self, tower.register_forward_hook(self.end))

    def receive(
        self, query: Tensor, key: Tensor, scale: float | None, softcap: float | None
    ) -> None:
        """Keep what the patches receive, and their keys, mean over heads."""
        if self.has_class_token:
            received = cls_attention(query[:, :, 0], key, scale=scale)
        else:
            received = attention_column_mean(query, key, scale=scale)
        first = int(self.has_class_token)
        put(Received(received[:, first:], key.mean(1)[:, first:]))

    def end(self, tower: nn.Module, args: Any, output: Any) -> None:
        """Store it in the output of the tower, and in the forward pass that runs the tower."""
        received, call = take(Received), current_call()
        if not isinstance(output, tuple):
            setattr(output, NAME, received)
        if call is not None:
            call.tower.append(received)


def attention_in(encoded: dict[str, Any] | None) -> list[Received]:
    """Return what is stored in the argument `mm_encoder_outputs` of a forward pass."""
    found = (getattr(output, NAME, None) for output in (encoded or {}).values())
    return [received for received in found if received is not None]


def tower_attention(rows: Tensor, tokens: int) -> Received:
    """Return the attention (R, n) and keys (R, n, d) of the images of this forward pass.

    Args:
        rows: (R,) the sequence of each image, ascending. Beams repeat the sequence of a prompt.
        tokens: n.

    Raises:
        ValueError: the runs of image tokens are not the patches of one image each.
    """
    images = current_call().tower
    count, patches = images[0][0].shape if len(images) == 1 else (0, 0)
    if patches != tokens or count == 0 or len(rows) % count:
        got = " and ".join(f"{len(row)} of {row.shape[1]} patches" for row, _ in images)
        raise ValueError(
            "strategy: expected images whose patches are the image tokens of the prompt, with text "
            f"between them, for 'visionzip', got {len(rows)} runs of {tokens} image tokens for "
            f"{got or 'no images'}; take another strategy, such as 'diverse'"
        )
    beams, counts = len(rows) // count, rows.bincount()
    within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    of_prompt = counts[::beams]
    index = (of_prompt.cumsum(0) - of_prompt)[rows // beams] + within
    attention, keys = images[0]
    return attention[index.to(attention.device)], keys[index.to(keys.device)]


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
