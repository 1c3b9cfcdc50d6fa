"""What a cross-modal model draws at random in a step of pre-training, fixed instead.

Two forms of a model that are given the same draw do the same work, so that they can be compared,
timed and counted.
"""

import torch
from torch import Tensor

from elip_models.models import albef, blip, meter
from elip_models.models.cross_modal import CrossModalModel
from elip_models.models.layers.objectives import IGNORED

MASKED_EVERY = 7  # tokens: about the 15% of the papers

Drawn = albef.Drawn | blip.Drawn | meter.Drawn


def fixed_draw(model: CrossModalModel, images: Tensor, input_ids: Tensor) -> Drawn:
    """The `drawn` of the model's forward, the same for the same inputs.

    The negatives of a pair are the next one's, every seventh token is masked, and every second text
    keeps its image.

    Args:
        images: (B, 3, H, W), on any device.
        input_ids: (B, L).

    Raises:
        TypeError: another model than ALBEF, BLIP and METER.
    """
    B, device = len(images), images.device
    others = torch.arange(B, device=device).roll(-1)
    match model:
        case albef.ALBEF():
            return albef.Drawn(others, others, *_masked(input_ids, model.config.mask_token_id))
        case blip.BLIP():
            return blip.Drawn(others, others)
        case meter.METER():
            masked = _masked(input_ids, model.config.mask_token_id)
            return meter.Drawn(*masked, 1 - torch.arange(B, device=device) % 2, images.roll(-1, 0))
    raise TypeError(f"model: expected ALBEF, BLIP or METER, got {type(model).__name__}")


def _masked(input_ids: Tensor, mask_token: int) -> tuple[Tensor, Tensor]:
    """Masked ids and labels, (B, L) each, as `mask_tokens` gives them."""
    chosen = torch.arange(input_ids.shape[1], device=input_ids.device) % MASKED_EVERY == 1
    return torch.where(chosen, mask_token, input_ids), torch.where(chosen, input_ids, IGNORED)
