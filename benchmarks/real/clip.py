"""Train a CLIP of DINOv2 and MiniLM on Flickr8k with fewer image tokens: recall against cost.

    python -m benchmarks.real.clip FOLDER --output X.json
    python -m benchmarks.real.clip FOLDER --output X.json --time

The commands continue and measure as those of `finetune.py`; `training.py` says what an arm is. Both
towers are pretrained. Their projections are fitted on the frozen towers first (Kumar et al.,
Fine-Tuning can Distort Pretrained Features, ICLR 2022), so 'dense 0' is the model before training.
In training, 'elip' is guided by the caption of each image, as in the paper; in evaluation no text
guides. Each run is judged by the recalls on the test split.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elip_models
from benchmarks.real import dinov2, materials, training
from benchmarks.real.features import stored
from benchmarks.real.materials import CAPTIONS, CaptionedSplit
from benchmarks.real.measures import RetrievalMaps, recalls
from benchmarks.real.training import DENSE, EVALUATION_BATCH, Learner, Photographs, Study

RATE, HEAD_RATE = 2e-5, 2e-4
LONGEST = 32
"""Tokens of a caption."""


class ImageText(Learner):
    """DINOv2, MiniLM, and a projection of each into one space."""

    def __init__(self, pixels: int, text: nn.Module, maps: RetrievalMaps) -> None:
        """Begin with DINOv2 for images of `pixels`, a text encoder and fitted projections."""
        super().__init__()
        self.tower = dinov2.timm_model(pixels)
        self.text = text
        self.image_projection = nn.Linear(maps.image.shape[1], maps.image.shape[0])
        self.text_projection = nn.Linear(maps.text.shape[1], maps.text.shape[0], bias=False)
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        with torch.no_grad():
            weight = maps.image / maps.scale.deviation
            self.image_projection.weight.copy_(weight)
            self.image_projection.bias.copy_(-weight @ maps.scale.mean)
            self.text_projection.weight.copy_(maps.text)

    def groups(self) -> list[dict[str, Any]]:
        """Return the towers' weights, and the projections with a higher rate."""
        towers = [*self.tower.parameters(), *self.text.parameters()]
        projections = [*self.image_projection.parameters(), *self.text_projection.parameters()]
        return [
            {"params": towers, "lr": RATE},
            {"params": [*projections, self.log_scale], "lr": HEAD_RATE},
        ]

    def loss(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the contrastive loss of images (B, 3, S, S) and their captions."""
        texts = materials.pooled(self.text, ids, mask)
        guidance = elip_models.guidance(self.tower, texts) if self.guided else nullcontext()
        with guidance:
            features = self.tower(images)
        left = F.normalize(self.image_projection(features).float(), dim=1)
        right = F.normalize(self.text_projection(texts).float(), dim=1)
        logits = self.log_scale.exp().clamp(max=100) * left @ right.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Flickr8k(Study):
    """DINOv2 and MiniLM on photographs with five captions each."""

    arms = (
        DENSE,
        *(f"{DENSE} {share}" for share in (0, 0.5)),
        *(f"{strategy} 0.5" for strategy in ("merge", "resize", "random")),
        *(f"elip:scorer={scorer} 0.5" for scorer in ("exact", "last")),
    )
    batch_size, steps = 48, 125

    def __init__(self, folder: Path, pixels: int) -> None:
        super().__init__(folder, pixels)
        self.text = folder / "all-MiniLM-L6-v2"
        train, self.test = (materials.flickr8k(folder, split) for split in ("train", "test"))
        self.captions = train.captions
        self.maps = self._maps(train)
        self.tokenizer, _ = materials.text_encoder(self.text)
        self.photographs = Photographs.read(train.paths, pixels, 0.7)
        self.test_photographs = Photographs.read(self.test.paths, pixels)

    def sizes(self) -> dict[str, int]:
        """Return the numbers of photographs."""
        return {"train": len(self.photographs.images), "test": len(self.test.paths)}

    def learner(self) -> ImageText:
        """Return the model before training."""
        return ImageText(self.pixels, materials.text_encoder(self.text)[1], self.maps)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw images, and one caption of each as token ids and mask."""
        chosen = torch.randperm(len(self.photographs.images))[: self.batch_size]
        caption = torch.randint(CAPTIONS, chosen.shape)
        texts = [self.captions[i] for i in (CAPTIONS * chosen + caption).tolist()]
        return self.photographs.batch(chosen, augmented=True), *self._tokens(texts)

    def scores(self, learner: Learner) -> dict[str, float]:
        """Return the mean recalls on the test split."""
        assert isinstance(learner, ImageText)
        indices = torch.arange(len(self.test.paths)).split(EVALUATION_BATCH)
        images = torch.cat([learner.tower(self.test_photographs.batch(part)) for part in indices])
        size = CAPTIONS * EVALUATION_BATCH
        parts = [self.test.captions[i : i + size] for i in range(0, len(self.test.captions), size)]
        texts = torch.cat([materials.pooled(learner.text, *self._tokens(part)) for part in parts])
        values = recalls(learner.image_projection(images), learner.text_projection(texts))
        return {name: round(value.mean().item(), 5) for name, value in values.items()}

    def _tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        inputs = self.tokenizer(
            texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        return inputs["input_ids"], inputs["attention_mask"]

    def _maps(self, train: CaptionedSplit) -> RetrievalMaps:
        """Return the projections that are fitted on the frozen towers."""
        folder = self.folder / "features"
        compute = partial(materials.text_features, train.captions, self.text)
        texts = stored(folder, [self.text.name, *train.captions], compute)
        key = [f"dense, {self.pixels} px", *map(str, train.paths)]
        images = stored(folder, key, partial(self._dense, train))
        return RetrievalMaps.fit(images, texts)

    @torch.no_grad()
    def _dense(self, train: CaptionedSplit) -> Tensor:
        model = dinov2.timm_model(self.pixels)
        return torch.cat([model(images) for images in dinov2.batches(train.paths, self.pixels)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return training.main(Flickr8k, "benchmarks.real.clip", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
