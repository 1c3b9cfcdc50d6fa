"""Fine-tune DINOv2 on photographs of clothes with fewer tokens: accuracy against cost.

    python -m benchmarks.real.finetune FOLDER --output X.json
    python -m benchmarks.real.finetune FOLDER --output X.json --time

The first command trains every arm with every seed and stores each run when it has ended; called
again, it goes on with the runs that are missing. The second adds the time of a training step of
each arm relative to dense; run it while nothing else runs. `materials.py` says what FOLDER holds,
`training.py` what an arm is. Each run is judged on the validation and test splits together.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.real import dinov2, materials, training
from benchmarks.real.training import DENSE, EVALUATION_BATCH, Learner, Photographs, Study

STRATEGIES, KEEPS = ("merge", "resize", "evit", "elip", "random"), (0.7, 0.5)
RATE, HEAD_RATE = 2e-5, 1e-3


class Classifier(Learner):
    """DINOv2 and a linear layer on its class token."""

    def __init__(self, pixels: int, classes: int) -> None:
        """Load the pretrained weights for images of `pixels`."""
        super().__init__()
        self.tower = dinov2.timm_model(pixels)
        self.head = nn.Linear(self.tower.num_features, classes)

    def groups(self) -> list[dict[str, Any]]:
        """Return the tower's weights, and those of the new layer with a higher rate."""
        return [
            {"params": self.tower.parameters(), "lr": RATE},
            {"params": self.head.parameters(), "lr": HEAD_RATE},
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, S, S)."""
        return self.head(self.tower(images))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of labels (B,)."""
        return F.cross_entropy(self(images).float(), labels, label_smoothing=0.1)


class Clothes(Study):
    """DINOv2 on the ten classes of the clothes."""

    arms = (
        DENSE,
        *(f"{DENSE} {share}" for share in KEEPS),
        *(f"{strategy} {keep}" for keep in KEEPS for strategy in STRATEGIES),
    )
    batch_size, steps = 16, 200

    def __init__(self, folder: Path, pixels: int) -> None:
        super().__init__(folder, pixels)
        train, *held_out = (
            materials.clothes(folder, split) for split in ("train", "validation", "test")
        )
        self.train, self.labels = Photographs.read(train.paths, pixels, 0.5), train.labels
        paths = [path for split in held_out for path in split.paths]
        self.held_out = Photographs.read(paths, pixels)
        self.held_out_labels = torch.cat([split.labels for split in held_out])

    def sizes(self) -> dict[str, int]:
        """Return the numbers of photographs."""
        return {"train": len(self.labels), "held_out": len(self.held_out_labels)}

    def learner(self) -> Classifier:
        """Return the classifier with a new last layer."""
        return Classifier(self.pixels, int(self.labels.max()) + 1)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw images and labels."""
        chosen = torch.randint(len(self.labels), (self.batch_size,))
        return self.train.batch(chosen, augmented=True), self.labels[chosen]

    def scores(self, learner: Learner) -> dict[str, float]:
        """Return the share of held-out photographs whose class is right."""
        indices = torch.arange(len(self.held_out_labels)).split(EVALUATION_BATCH)
        classes = [learner(self.held_out.batch(chosen)).argmax(1) for chosen in indices]
        correct = torch.cat(classes) == self.held_out_labels
        return {"top1": round(correct.double().mean().item(), 5)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    return training.main(Clothes, "benchmarks.real.finetune", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
