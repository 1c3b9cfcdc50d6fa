"""Generated questions with DINOv2's features of their images, computed once and stored."""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.real.dinov2 import MEAN, PATCH, STD, transformers_model
from elip_models.pretraining.data.scene_captions import NUMBERS, at_place, plural, with_article
from elip_models.pretraining.data.scene_sampling import EMOJI, place_names
from elip_models.pretraining.data.tasks.questions import EmojiQuestions

PIXELS = 112
TOKENS, WIDTH = (PIXELS // PATCH) ** 2, 384
KINDS = ("presence", "count", "place", "colour", "relation", "neighbour")
"""Of question `i` at `i // 2 % len(EmojiQuestions.forms)`: each text appears twice."""
BATCH, CHUNK = 32, 2000
ANSWERS = EmojiQuestions.answers


def _phrases() -> dict[str, str]:
    """Return the answer that each phrase of a question means, longest first."""
    forms = {form(name): name for name in EMOJI for form in (plural, str)}
    forms |= {NUMBERS[int(i)]: i for i in ANSWERS if i.isdigit()}
    forms |= {at_place(place): place for place in (*place_names(0), *place_names(1))}
    return dict(sorted(forms.items(), key=lambda form: -len(form[0])))


_PHRASES = _phrases()


class Questions(NamedTuple):
    """Questions as token ids, and what belongs to them.

    ids: (Q, T) int64, padded with 0 on the left.
    answers: (Q, V) fp32, the share of each token of the vocabulary in the right answers.
    turns: (Q, C) int64, further questions on the image with answers, padded with 0 on the right.
    told: (Q, C) int64, the answers among `turns`, 0 elsewhere.
    kinds: (Q,) int64, indices into `KINDS`.
    features: (Q, P, 384) fp16, of the P patches of each image; 64 at 112 px.
    """

    ids: Tensor
    answers: Tensor
    turns: Tensor
    told: Tensor
    kinds: Tensor
    features: Tensor


@cache
def vocabulary() -> dict[str, int]:
    """Return the ids of the special tokens, and of all words and phrases."""
    examples = EmojiQuestions(300, seed=9)
    texts = [examples.text_alone(i).text for i in range(len(examples))]
    texts += [text for i in range(len(examples)) for text, _ in _conversation(examples, i)]
    words = {word for text in texts for word in tokens_of(text)}
    return {
        each: i
        for i, each in enumerate(["[PAD]", "[BOS]", "[IMAGE]", *sorted(words | set(ANSWERS))])
    }


def tokens_of(text: str) -> list[str]:
    """Return a text as words; an answer is one word, whatever its form."""
    text = text.rstrip("?").replace(",", " ,")
    for phrase, answer in _PHRASES.items():
        text = re.sub(rf"\b{phrase}\b", answer.replace(" ", "_"), text)
    return [word.replace("_", " ") for word in text.split()]


def read_questions(count: int, seed: int, folder: Path, pixels: int = PIXELS) -> Questions:
    """Return `count` questions on images of `pixels`; compute the features that `folder` lacks."""
    source, known = EmojiQuestions(count, seed=seed, image_size=pixels), vocabulary()
    rows, turns, told = [], [], []
    answers = torch.zeros(count, len(known))
    for i in range(count):
        example = source.text_alone(i)
        rows.append([known[word] for word in tokens_of(example.text)])
        for answer, share in example.answers.items():
            answers[i, known[answer]] = share
        turns.append([])
        told.append([])
        for text, answer in _conversation(source, i):
            asked = [known[word] for word in tokens_of(text)]
            turns[-1] += [*asked, known[answer]]
            told[-1] += [*[0] * len(asked), known[answer]]
    ids = _padded(rows, left=True)
    further = (_padded(each, left=False) for each in (turns, told))
    kinds = torch.arange(count) // EmojiQuestions.turns % len(EmojiQuestions.forms)
    features = _features(source, folder)
    return Questions(ids, answers, *further, kinds, features)


def _conversation(source: EmojiQuestions, index: int) -> list[tuple[str, str]]:
    """Return further questions on the scene with their answers, in random order.

    Each group is asked for its count, its name or its place, so that one answer seldom gives away
    another.
    """
    scene = source.scenes(index)[0]
    rng = np.random.default_rng((source.seed, index))
    names = [group.name for group in scene.groups]
    absent = rng.choice([name for name in EMOJI if name not in names])
    turns = [
        (f"is there {with_article(rng.choice(names))}?", "yes"),
        (f"is there {with_article(absent)}?", "no"),
    ]
    for group in scene.groups:
        asked = [
            (f"how many {plural(group.name)} are there?", str(group.count)),
            (f"what is {at_place(group.place.name)}?", group.name),
        ]
        if group.count == 1:
            asked.append((f"where is the {group.name}?", group.place.name))
        turns.append(asked[rng.integers(len(asked))])
    return [turns[i] for i in rng.permutation(len(turns))]


def _padded(rows: list[list[int]], left: bool) -> Tensor:
    """Return rows of ids as one tensor, padded with 0 on the left or on the right."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, values in zip(ids, rows, strict=True):
        start = len(row) - len(values) if left else 0
        row[start : start + len(values)] = torch.tensor(values)
    return ids


def _features(source: EmojiQuestions, folder: Path) -> Tensor:
    """Return DINOv2's patch features of the images of a source; a file holds `CHUNK` of them."""
    pixels = source.image_size
    model = transformers_model(pixels)
    folder.mkdir(parents=True, exist_ok=True)
    found = torch.empty(len(source), (pixels // PATCH) ** 2, WIDTH, dtype=torch.float16)
    for start in track(range(0, len(source), CHUNK), "features"):
        indices = range(start, min(start + CHUNK, len(source)))
        path = folder / f"{source.name}-{pixels}px-{source.seed}-{indices.start}-{indices.stop}.npy"
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            np.save(partial, _encoded(model, source, indices))
            partial.rename(path)
        found[indices.start : indices.stop] = torch.from_numpy(np.load(path))
    return found


@torch.inference_mode()
def _encoded(model: nn.Module, source: EmojiQuestions, indices: range) -> np.ndarray:
    """Return the features (n, P, 384) fp16 of some images of the source."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    found = []
    for start in range(indices.start, indices.stop, BATCH):
        rows = range(start, min(start + BATCH, indices.stop))
        arrays = [np.asarray(source[i].images[0].convert("RGB")) for i in rows]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        found.append(model((images - mean) / std).last_hidden_state[:, 1:].half().numpy())
    return np.concatenate(found)
