"""The tasks: a linear probe, nearest neighbours, and text-image retrieval, image by image.

Everything is fitted on dense features of training photographs, and applied to the features of
reduced models. Each measure is (n,), the result of each image, so that differences are paired.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.real.materials import CAPTIONS
from elip_models.calibration.linear_probe import LinearProbe

TOP1, OWN, KNN = "top1", "top1_own", "knn"
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Inverse strengths of the probe's penalty, of which the validation split chooses one."""
NEIGHBOURS, TEMPERATURE = 10, 0.07
WIDTH, EPOCHS, BATCH = 256, 40, 500
RECALLS = ("text_to_image_r1", "text_to_image_r5", "image_to_text_r1", "image_to_text_r5")


class Scale(NamedTuple):
    """Mean and standard deviation of training features, each (D,)."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Return the scale of features (n, D)."""
        return cls(features.mean(0), features.std(0))

    def apply(self, features: Tensor) -> Tensor:
        """Return features (n, D) of mean 0 and deviation 1 on the training photographs."""
        return (features - self.mean) / self.deviation


def fitted_probe(
    features: Tensor, labels: Tensor, validation: Tensor, validation_labels: Tensor
) -> LinearProbe:
    """Return the probe of training features whose penalty is best on the validation split."""
    probes = [LinearProbe.fit(features, labels, inverse_penalty=penalty) for penalty in PENALTIES]
    return max(probes, key=lambda probe: probe.correct(validation, validation_labels).mean())


def knn_correct(features: Tensor, labels: Tensor, train: Tensor, train_labels: Tensor) -> Tensor:
    """Return (n,) ones where the nearest training features vote for the right class.

    A vote has the weight exp(cosine / 0.07), as in Wu et al., CVPR 2018.
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(train, dim=1).T
    nearest, indices = similarity.topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(features), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[indices], (nearest / TEMPERATURE).exp())
    return (votes.argmax(1) == labels).double()


class RetrievalMaps(NamedTuple):
    """Linear maps of image features (n, D) and text features (m, E) into one space."""

    scale: Scale
    image: Tensor
    text: Tensor

    @classmethod
    def fit(cls, images: Tensor, texts: Tensor, *, seed: int = 0) -> Self:
        """Return maps learnt by the contrastive loss, with one caption of an image in each epoch.

        Args:
            images: (n, D) dense features of the training photographs.
            texts: (`CAPTIONS` n, E) features of their captions.
        """
        generator = torch.Generator().manual_seed(seed)
        scale = Scale.of(images)
        images, texts = scale.apply(images), texts.view(len(images), CAPTIONS, -1)
        image = torch.randn(WIDTH, images.shape[1], generator=generator) / images.shape[1] ** 0.5
        text = torch.randn(WIDTH, texts.shape[2], generator=generator) / texts.shape[2] ** 0.5
        log_temperature = torch.tensor(3.0)
        weights = [weight.requires_grad_() for weight in (image, text, log_temperature)]
        optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)
        steps = EPOCHS * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
                caption = torch.randint(CAPTIONS, (len(chosen),), generator=generator)
                left = F.normalize(images[chosen] @ image.T, dim=1)
                right = F.normalize(texts[chosen, caption] @ text.T, dim=1)
                logits = log_temperature.exp().clamp(max=100) * left @ right.T
                target = torch.arange(len(chosen))
                loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return cls(scale, image.detach(), text.detach())

    def recalls(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return the `recalls` of image features (n, D) and text features (`CAPTIONS` n, E)."""
        return recalls(self.scale.apply(images) @ self.image.T, texts @ self.text.T)


def recalls(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
    """Return each of `RECALLS` by image, (n,): for texts, the share of the image's captions.

    Args:
        images: (n, D). texts: (`CAPTIONS` n, D), compared with the images by cosine.
    """
    similarity = F.normalize(texts, dim=1) @ F.normalize(images, dim=1).T
    own = torch.arange(len(texts)) // CAPTIONS
    text_rank = (similarity > similarity.gather(1, own[:, None])).sum(1)
    best = similarity.T.gather(1, torch.arange(len(texts)).view(-1, CAPTIONS)).amax(1)
    image_rank = (similarity > best).sum(0)
    by_text = text_rank.view(-1, CAPTIONS)
    values = [(by_text < k).double().mean(1) for k in (1, 5)]
    values += [(image_rank < k).double() for k in (1, 5)]
    return dict(zip(RECALLS, values, strict=True))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(np.asarray(first), np.asarray(second)).statistic)
