"""Image-text retrieval by features: recall@k both ways, for several captions per image.

From image to text, a query is correct at k if any caption of the image is among the k most similar
texts. From text to image, it is correct if the caption's image is among the k most similar images.
Ties count against the model: a wrong candidate as similar as the correct one, within 1e-6, ranks
before it. A model with constant features therefore has a recall of 0. Intervals are over images,
see `intervals`: the captions of an image are drawn together.

Images are encoded without text, and texts without image. Entries of a list that show the same image
form one image with all their captions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elip_models.intervals import Interval, score_interval
from elip_models.pretraining.data import Source, evaluation_batches
from elip_models.pretraining.data.shared_images import group_by_image
from elip_models.pretraining.models.base import eval_mode
from elip_models.pretraining.tasks.features import (
    encode_images,
    encode_texts,
    ranks_by_chunk,
    ranks_of,
)
from elip_models.pretraining.tasks.task import Loading, Progress, no_progress, read_all
from elip_models.validation import PositiveInt, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.pretraining.models.base import PretrainedModel

KS = (1, 5, 10)
RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in KS)


@dataclass(frozen=True)
class RetrievalScores:
    """Recalls in [0, 1] of a model on a set of images and captions, by name."""

    recalls: dict[str, float]  # "image_to_text_r1", .., "text_to_image_r10"
    chance: dict[str, float]  # expected recalls of a random ranking
    num_images: int
    num_texts: int
    intervals: dict[str, Interval]  # 95%, of the recalls
    num_skipped: int = 0  # samples that could not be read

    @property
    def metrics(self) -> dict[str, float]:
        """Recalls by name, for logs."""
        return self.recalls

    def summary(self) -> str:
        """Return one line with R@1 both ways."""
        names = {"image to text": "image_to_text_r1", "text to image": "text_to_image_r1"}
        return "R@1 " + ", ".join(f"{way} {self.recalls[key]:.1%}" for way, key in names.items())


def recall_at_k(
    similarity: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return recall@k both ways for a full similarity matrix (num_images, num_texts).

    `text_to_image` (num_texts,) is the row of the image that each text describes.
    """
    _check_matrix("similarity", similarity)
    num_images, num_texts = similarity.shape
    _check_index(text_to_image, num_images, num_texts)
    for k in ks:
        check("ks", k, PositiveInt)
    image_ids = torch.arange(num_images, device=similarity.device)
    relevant = image_ids[:, None] == text_to_image[None, :]
    return _recalls(ranks_of(similarity, relevant), ranks_of(similarity.T, relevant.T), ks)


def recall_of_features(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Tensor,
    *,
    ks: Sequence[int] = KS,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Return `recall_at_k` of `image_features @ text_features.T`, for `chunk_size` rows at once."""
    for k in ks:
        check("ks", k, PositiveInt)
    return _recalls(*_ranks(image_features, text_features, text_to_image, chunk_size), ks)


def recall_intervals(
    image_ranks: Tensor, text_ranks: Tensor, text_to_image: Tensor, ks: Sequence[int] = KS
) -> dict[str, Interval]:
    """Return the recalls with their 95% intervals, with the names of `recall_at_k`.

    Args:
        image_ranks: (num_images,), number of texts that rank before the first correct one.
        text_ranks: (num_texts,), number of images that rank before the correct one.
        text_to_image: (num_texts,), the image of each text, whose captions are drawn together.
        ks: Numbers of candidates.
    """
    owners = text_to_image.cpu().numpy()
    ways = {"image_to_text": (image_ranks, None), "text_to_image": (text_ranks, owners)}
    return {
        f"{way}_r{k}": score_interval((ranks < k).cpu().numpy(), clusters)
        for way, (ranks, clusters) in ways.items()
        for k in ks
    }


def chance_level(
    text_to_image: Tensor, num_images: int, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return the expected recalls of a random ranking, with the names of `recall_at_k`.

    An image with c of the T texts is found at k with probability 1 - C(T-c, k) / C(T, k).
    """
    num_texts = len(text_to_image)
    counts = torch.bincount(text_to_image.cpu(), minlength=num_images).tolist()
    chance = {}
    for k in ks:
        ways = math.comb(num_texts, k)
        missed = sum(math.comb(num_texts - count, k) / ways if ways else 0.0 for count in counts)
        chance[f"image_to_text_r{k}"] = 1.0 - missed / num_images
    return chance | {f"text_to_image_r{k}": min(1.0, k / num_images) for k in ks}


def evaluate_retrieval(
    model: "PretrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    source: Source,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    max_bad_share: float = 0.05,
    progress: Progress = no_progress,
) -> RetrievalScores:
    """Encode each image and each caption alone, and rank them against each other.

    The model is evaluated in eval mode, and its mode and the random state are restored.

    Args:
        model: A model with image and text features. Its config sets the preprocessing.
        tokenizer: Tokenizer of the model.
        source: Images with one or several captions each.
        batch_size: Images, and captions, in one forward pass.
        num_workers: Worker processes; 0 loads in this process.
        max_bad_share: Largest allowed share of unreadable samples.
        progress: Called after each batch.

    Raises:
        DataError: More samples are unreadable, or all of them.
    """
    source = group_by_image(source)
    loading = Loading(batch_size, num_workers, max_bad_share, progress)
    batches, report = read_all(evaluation_batches, model, source, loading)
    with eval_mode(model):
        image_features, captions = encode_images(model, batches)
        texts = [text for several in captions for text in several]
        text_features = encode_texts(model, tokenizer, texts, batch_size, progress)
    text_to_image = [image for image, several in enumerate(captions) for _ in several]
    text_to_image = torch.tensor(text_to_image, device=image_features.device)
    ranks = _ranks(image_features, text_features, text_to_image)
    return RetrievalScores(
        recalls=_recalls(*ranks, KS),
        chance=chance_level(text_to_image, len(captions)),
        num_images=len(captions),
        num_texts=len(texts),
        intervals=recall_intervals(*ranks, text_to_image),
        num_skipped=len(report.reasons),
    )


def _ranks(
    image_features: Tensor, text_features: Tensor, text_to_image: Tensor, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return the ranks of the first correct text of each image, and of the image of each text."""
    _check_matrix("image_features", image_features)
    _check_matrix("text_features", text_features, width=image_features.shape[1])
    _check_index(text_to_image, len(image_features), len(text_features))
    check("chunk_size", chunk_size, PositiveInt)
    image_ids = torch.arange(len(image_features), device=text_to_image.device)
    return (
        ranks_by_chunk(image_features, text_features, image_ids, text_to_image, chunk_size),
        ranks_by_chunk(text_features, image_features, text_to_image, image_ids, chunk_size),
    )


def _recalls(image_ranks: Tensor, text_ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    ranks = {"image_to_text": image_ranks, "text_to_image": text_ranks}
    return {
        f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ranks.items() for k in ks
    }


def _check_matrix(name: str, value: Tensor, width: int | None = None) -> None:
    kind = getattr(value, "dtype", type(value).__name__)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    if value.ndim != 2 or width not in (None, value.shape[1]):
        expected = f"(.., {width})" if width else "two dimensions"
        raise ValueError(f"{name}: expected {expected}, got {tuple(value.shape)}")


def _check_index(text_to_image: Tensor, num_images: int, num_texts: int) -> None:
    name, kind = "text_to_image", getattr(text_to_image, "dtype", type(text_to_image).__name__)
    if kind not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected an int32 or int64 tensor, got {kind}")
    if text_to_image.shape != (num_texts,):
        raise ValueError(f"{name}: expected ({num_texts},), got {tuple(text_to_image.shape)}")
    found = sorted(set(text_to_image.tolist()))
    if num_images == 0 or found != list(range(num_images)):
        raise ValueError(
            f"{name}: expected at least one text for each of the {num_images} images and none for "
            f"another, got texts for {len(found)} images, {', '.join(map(str, found[:5]))} .."
        )
