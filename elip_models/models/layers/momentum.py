"""Momentum encoders and the queue of their features (MoCo; ALBEF, section 3.2; BLIP).

theta_m = m theta_m + (1 - m) theta        before each step's momentum features
queue   = the latest Q features; a batch overwrites the oldest, across the end if need be
"""

import copy

import torch
from torch import Tensor, nn

from elip_kernels.autocast import no_autocast


def momentum_copy(module: nn.Module) -> nn.Module:
    """Copy a module, without gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum_(copied: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the copy's parameters towards the online ones."""
    theirs, ours = list(copied.parameters()), list(online.parameters())
    torch._foreach_lerp_(theirs, ours, 1.0 - momentum)


NO_IMAGE = -100  # the number of an image in a queue's columns that were never filled


class FeatureQueue(nn.Module):
    """The latest features of images and texts, (E, Q) each, normalised.

    Args:
        width: E.
        size: Q.
        with_ids: it also holds which image each pair shows, `ids` (Q,) int64.
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

    def behind(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Put the queue behind the batch of image and text (B, E) -> (E, B + Q) each."""
        return torch.cat([image.T, self.image], dim=1), torch.cat([text.T, self.text], dim=1)

    def positives(self, own: Tensor, batch: Tensor) -> Tensor:
        """Which of the batch and the queue behind it show the images `own` (B,) -> (B, C + Q) bool;
        batch: (C,), those of the batch.
        """
        return own[:, None] == torch.cat([batch, self.ids])

    def check(self, batch_size: int) -> None:
        """Raises ValueError where a batch is longer than the queue."""
        size = self.image.shape[1]
        if size < batch_size:
            raise ValueError(
                f"queue_size: expected at least the batch, {batch_size}, got {size}; make the "
                "queue longer"
            )

    @torch.no_grad()
    def enqueue_(self, image: Tensor, text: Tensor, ids: Tensor | None = None) -> None:
        """Overwrite the oldest B features by image and text (B, E), of the images `ids` (B,) where
        the queue holds them, without a host synchronisation.

        Raises:
            ValueError: more features than the queue holds.
        """
        B, size = image.shape[0], self.image.shape[1]
        self.check(B)
        columns = (self.pointer + torch.arange(B, device=image.device)) % size
        self.image.index_copy_(1, columns, image.T.to(self.image.dtype))
        self.text.index_copy_(1, columns, text.T.to(self.text.dtype))
        if self.ids is not None:
            self.ids.index_copy_(0, columns, ids)
        self.pointer.copy_((self.pointer + B) % size)


def similarities(
    features: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Image-to-text and text-to-image (B, C), over the temperature, in the queue's dtype, also
    under autocast: a cosine in bf16 is off by 0.002, over a temperature of 0.07 by 0.03.

    Args:
        features: (B, E) of image and text.
        keys: (E, C) of image and text, see `FeatureQueue.behind`.
        temperature: scalar.
    """
    (image, text), (images, texts) = features, keys
    with no_autocast(image):
        image_to_text = image.to(texts.dtype) @ texts / temperature
        text_to_image = text.to(images.dtype) @ images / temperature
    return image_to_text, text_to_image
