"""Momentum encoders and the queue of their features.

theta_m = m theta_m + (1 - m) theta    before the momentum features of each step
queue   = the latest Q features; a batch overwrites the oldest ones (ring buffer)

Source: MoCo (He et al., 2020); ALBEF, section 3.2; BLIP.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from elip_kernels.autocast import no_autocast


def update_momentum_(copied: nn.Module, online: nn.Module, momentum: float) -> None:
    """Update the parameters of the copy by those of the online module."""
    theirs, ours = list(copied.parameters()), list(online.parameters())
    get_ema_multi_avg_fn(momentum)(theirs, ours, None)


NO_IMAGE = -100  # image id of the columns of a queue that were never filled


class FeatureQueue(nn.Module):
    """Queue of the latest normalised features of images and of texts, (width, size) each.

    `with_ids` also stores the image id of each pair, `ids` (size,) int64.
    """

    image: Tensor
    text: Tensor
    ids: Tensor | None
    pointer: Tensor

    def __init__(self, width: int, size: int, *, with_ids: bool = False) -> None:
        super().__init__()
        for name in ("image", "text"):
            features = nn.functional.normalize(torch.randn(width, size), dim=0)
            self.register_buffer(name, features)
        self.register_buffer("ids", torch.full((size,), NO_IMAGE) if with_ids else None)
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def contrastive_keys(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Append the queue to the features (B, E) of a batch -> (E, B + Q) for images and texts."""
        return torch.cat([image.T, self.image], dim=1), torch.cat([text.T, self.text], dim=1)

    def positives(self, own: Tensor, batch: Tensor) -> Tensor:
        """Return (B, C + Q) bool, which of batch (C,) and queue show the images `own` (B,)."""
        return own[:, None] == torch.cat([batch, self.ids])

    def check(self, batch_size: int) -> None:
        """Raise ValueError if a batch is longer than the queue."""
        size = self.image.shape[1]
        if size < batch_size:
            raise ValueError(
                f"queue_size: expected at least the batch, {batch_size}, got {size}; increase "
                "queue_size"
            )

    @torch.no_grad()
    def enqueue_(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Overwrite the oldest B features, and their image ids, without a host synchronisation.

        Pairs with a feature that is not finite are left out, and the pairs before them stay.
        """
        B, size = image.shape[0], self.image.shape[1]
        self.check(B)
        columns = (self.pointer + torch.arange(B, device=image.device)) % size
        is_finite = image.isfinite().all(1) & text.isfinite().all(1)
        rows = {"image": image.T, "text": text.T} | ({} if self.ids is None else {"ids": ids})
        for name, new in rows.items():
            stored = getattr(self, name)
            new = torch.where(is_finite, new.to(stored.dtype), stored[..., columns])
            stored.index_copy_(-1, columns, new)
        self.pointer.copy_((self.pointer + B) % size)


def similarities(
    features: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Return image-to-text and text-to-image similarities (B, C), divided by the temperature.

    For keys (E, C), see `contrastive_keys`. The dtype is that of the queue, also under autocast: a
    bf16 cosine has an error of 0.002, which a temperature of 0.07 increases to 0.03.
    """
    (image, text), (images, texts) = features, keys
    with no_autocast(image):
        image_to_text = image.to(texts.dtype) @ texts / temperature
        text_to_image = text.to(images.dtype) @ images / temperature
    return image_to_text, text_to_image
