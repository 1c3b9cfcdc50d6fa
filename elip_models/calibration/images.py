"""Tasks on images that a model reads one by one, in batches of any size."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.calibration.candidates import Candidates, TowerCandidates
from elip_models.calibration.task import Outputs, Task
from elip_models.profiling.measure import Step
from elip_models.saving.files import tensors_sha256
from elip_models.validation import PositiveInt, check, shortened

LEAST_IMAGES = 8


class ImageTask(Task):
    """A task on images (3, H, W), whose outputs are computed image by image.

    Attributes:
        images: a tensor (n, 3, H, W), or a sequence that reads image i when indexed.
        batch_size: images in a batch.
    """

    def __init__(self, images: Tensor | Sequence[Tensor], *, batch_size: int = 8) -> None:
        self.images = _checked(images)
        self.batch_size = check("batch_size", batch_size, PositiveInt)

    @property
    def count(self) -> int:
        return len(self.images)

    @abstractmethod
    def forward(self, model: nn.Module, pixels: Tensor) -> Tensor:
        """Return what the model computes for images (B, 3, H, W), as floats (B, ..)."""

    def kept(self, computed: Tensor, numbers: Sequence[int]) -> Outputs:
        """Return what is stored of the result of `forward` for the images of these numbers."""
        return {"features": computed.float()}

    @torch.no_grad()
    def outputs(
        self, model: nn.Module, images: Sequence[int], advance: Callable[[int], object]
    ) -> Outputs:
        kept = []
        for first in range(0, len(images), self.batch_size):
            numbers = images[first : first + self.batch_size]
            computed = self.forward(model, self.pixels(model, numbers))
            self._check_finite(computed, numbers)
            kept.append({name: value.cpu() for name, value in self.kept(computed, numbers).items()})
            advance(len(numbers))
        return {name: torch.cat([batch[name] for batch in kept]) for name in kept[0]}

    def steps(self, model: nn.Module, images: Sequence[int]) -> dict[str, Step]:
        return {"": partial(self.forward, model, self.pixels(model, images))}

    def candidates(self, model: nn.Module, *, class_token_only: bool = False) -> Candidates:
        pixels = self.pixels(model, [0])
        return TowerCandidates(model, pixels, class_token_only=class_token_only)

    def contents(self) -> dict[str, Any]:
        """Return the SHA-256 of all images."""
        digest = hashlib.sha256()
        for i in range(self.count):
            digest.update(tensors_sha256({"": self.images[i]}).encode())
        return {"images": digest.hexdigest()}

    def pixels(self, model: nn.Module, numbers: Sequence[int]) -> Tensor:
        """Return the images of these numbers (B, 3, H, W), as the model reads them."""
        weight = next(model.parameters())
        pixels = torch.stack([self.images[i] for i in numbers])
        return pixels.to(weight.device, weight.dtype)

    def _check_finite(self, computed: Tensor, numbers: Sequence[int]) -> None:
        """Raise ValueError for an image whose result is not finite."""
        bad = (~computed.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                "images: expected finite outputs of the model, got NaN or infinity for "
                f"images[{numbers[bad[0]]}]; remove it, or use fp32 or other weights"
            )


def _checked(images: Any) -> Tensor | Sequence[Tensor]:
    """Return the images; raise TypeError or ValueError if there are too few, or of another form."""
    expected = f"floating-point images (n, 3, H, W), at least {LEAST_IMAGES}"
    if not isinstance(images, Tensor | Sequence) or isinstance(images, str):
        raise TypeError(f"images: expected {expected}, got {shortened(images)}")
    if len(images) < LEAST_IMAGES:
        raise ValueError(f"images: expected {expected}, got {len(images)}; add images")
    first = images[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        got = first.dtype if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(f"images: expected {expected}, got images of {got}")
    if first.dim() != 3 or len(first) != 3:
        raise ValueError(f"images: expected {expected}, got images {tuple(first.shape)}")
    return images
