"""Generated questions with DINOv2's features of their images, computed once and stored."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.real.dinov2 import MEAN, STD, transformers_model
from elip_models.data.scene_captions import plural, with_article
from elip_models.data.scene_sampling import EMOJI
from elip_models.data.tasks.questions import FORMS, EmojiQuestions

PIXELS = 112
TOKENS, WIDTH = (PIXELS // 14) ** 2, 384
KINDS = ("presence", "count", "place", "colour", "relation", "neighbour")
"""Of question `i` at `i // 2 % len(FORMS)`: each text appears twice."""
BATCH = 32


class Questions(NamedTuple):
    """Questions as token ids, and what belongs to them.

    ids: (Q, T) int64, padded with 0 on the left.
    answers: (Q, V) fp32, the share of each token of the vocabulary in the right answers.
    kinds: (Q,) int64, indices into `KINDS`.
    features: (Q, 64, 384) fp16, of the patches of each image.
    """

    ids: Tensor
    answers: Tensor
    kinds: Tensor
    features: Tensor


def vocabulary() -> dict[str, int]:
    """Return the ids of the special tokens, of all words of questions, and of whole answers."""
    examples = EmojiQuestions(1000, seed=9)
    texts = [examples.text_alone(i).text for i in range(len(examples))]
    names = [form(name) for name in EMOJI for form in (str, plural, with_article)]
    words = {word for text in (*texts, *names) for word in _words(text)}
    answers = [f"answer: {each}" for each in EmojiQuestions.answers]
    return {
        each: i for i, each in enumerate(["[PAD]", "[BOS]", "[IMAGE]", *sorted(words), *answers])
    }


def read_questions(count: int, seed: int, folder: Path) -> Questions:
    """Return `count` questions; compute the features of their images unless `folder` has them."""
    source, known = EmojiQuestions(count, seed=seed, image_size=PIXELS), vocabulary()
    rows, answers = [], torch.zeros(count, len(known))
    for i in range(count):
        example = source.text_alone(i)
        rows.append([known[word] for word in _words(example.text)])
        for answer, share in example.answers.items():
            answers[i, known[f"answer: {answer}"]] = share
    ids = torch.zeros(count, max(map(len, rows)), dtype=torch.int64)
    for row, values in zip(ids, rows, strict=True):
        row[len(row) - len(values) :] = torch.tensor(values)
    kinds = torch.arange(count) // EmojiQuestions.turns % len(FORMS)
    return Questions(ids, answers, kinds, _features(source, folder / f"{seed}-{count}.npy"))


def _words(text: str) -> list[str]:
    return text.rstrip("?").split()


def _features(source: EmojiQuestions, path: Path) -> Tensor:
    """Return DINOv2's patch features of the images of a source."""
    if path.exists():
        return torch.from_numpy(np.load(path))
    model = transformers_model(PIXELS)
    found = np.empty((len(source), TOKENS, WIDTH), np.float16)
    with torch.inference_mode():
        for start, images in track(_batches(source), "features", len(source) // BATCH):
            features = model(images).last_hidden_state[:, 1:]
            found[start : start + len(images)] = features.half().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    np.save(partial, found)
    partial.rename(path)
    return torch.from_numpy(found)


def _batches(source: EmojiQuestions) -> Iterator[tuple[int, Tensor]]:
    """Yield the first index and the normalised images of each batch."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for start in range(0, len(source), BATCH):
        indices = range(start, min(start + BATCH, len(source)))
        arrays = [np.asarray(source[i].images[0].convert("RGB")) for i in indices]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        yield start, (images - mean) / std
