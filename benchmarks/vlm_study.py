"""Train a small LLaVA on generated questions, and remove image tokens from its sequence.

    python -m benchmarks.vlm_study FEATURES --output X.json [--seeds 0 1 2] [--arms ARM ..]

FEATURES is a folder for the features of the images and the trained models; a stopped run continues
behind the last of them. The image tower is DINOv2 ViT-S/14, frozen, at 112 px; the decoder has
three layers. An arm trains one model of each seed: with every token ('dense'), with a strategy
('diverse'), or on images of half the side ('smaller'). Strategies and smaller images have a quarter
of the tokens. The dense model is also judged with fewer tokens, without further training.

The loss is that of the answers, given as `labels`: a strategy that reads the question reads the
text before the first of them.
"""

import argparse
import datetime
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.real.dinov2 import MEAN, PATCH, STD, timm_model
from elip_models import reduce_, unreduce_
from elip_models.intervals import bootstrap_interval
from elip_models.pretraining.data.emoji_tasks import EmojiQuestions
from elip_models.pretraining.data.scene_captions import NUMBERS, at_place, plural, with_article
from elip_models.pretraining.data.scene_sampling import COLOURS, COUNTS, NAMES, place_names
from elip_models.profiling.commit import commit
from elip_models.saving.files import write_json

PIXELS, WIDTH = 112, 384
TOKENS = (PIXELS // PATCH) ** 2
KINDS = ("presence", "count", "place", "colour", "relation", "neighbour")
"""Of question `i` at `i // 2 % 6`: each text appears twice."""
DENSE, SMALLER, TRAINED_KEEP = "dense", "smaller", 0.25
RELEVANT = "diverse:relevance=true"
ARMS = (DENSE, "random_tokens", "pool", "diverse", RELEVANT, SMALLER)
KEEPS = (0.5, 0.25, 0.11)
AFTERWARDS = ("random_tokens", "stride", "pool", "diverse", RELEVANT, "fastv:layer=1")
QUESTIONS, EVALUATED, STEPS, BATCH, CHUNK = 30_000, 2000, 4000, 32, 2000
LR, WARMUP = 2e-3, 0.1  # warm-up as a share of the steps
PAD, BOS, IMAGE = 0, 1, 2
NO_LABEL = -100


class Questions(NamedTuple):
    """Questions as token ids, and the images that they ask about.

    ids: (Q, T) int64, padded on the left.
    answers: (Q,) int64.
    turns, told: (Q, C) int64, further questions on the image with their answers, padded on the
        right; the answers alone, NO_LABEL elsewhere.
    features: (Q, P, 384) fp16, of the P patches of each image.
    """

    ids: Tensor
    answers: Tensor
    turns: Tensor
    told: Tensor
    features: Tensor


def read_questions(count: int, seed: int, folder: Path, pixels: int = PIXELS) -> Questions:
    """Return `count` questions on images of `pixels`; compute the features that `folder` lacks."""
    source, known = EmojiQuestions(count, seed=seed, image_size=pixels), vocabulary()
    rows, answers, turns, told = [], [], [], []
    for i in range(count):
        example = source.text_alone(i)
        rows.append([known[word] for word in words_of(example.text)])
        answers.append(known[next(iter(example.answers))])
        asked, said = [], []
        for text, answer in conversation(source, i):
            words = [known[word] for word in words_of(text)]
            asked += [*words, known[answer]]
            said += [*[NO_LABEL] * len(words), known[answer]]
        turns.append(asked)
        told.append(said)
    return Questions(
        padded(rows, PAD, left=True),
        torch.tensor(answers),
        padded(turns, PAD),
        padded(told, NO_LABEL),
        stored_features(source, folder),
    )


def conversation(source: EmojiQuestions, index: int) -> list[tuple[str, str]]:
    """Return further questions on the scene with their answers, in random order.

    Each group is asked for its count, its name or its place, so that one answer seldom gives away
    another.
    """
    rng, groups = Random(f"{source.seed} {index}"), source.scenes(index)[0].groups
    shown = [group.name for group in groups]
    absent = rng.choice([name for name in NAMES if name not in shown])
    turns = [
        (f"is there {with_article(rng.choice(shown))}?", "yes"),
        (f"is there {with_article(absent)}?", "no"),
    ]
    for group in groups:
        asked = [
            (f"how many {plural(group.name)} are there?", str(group.count)),
            (f"what is {at_place(group.place.name)}?", group.name),
        ]
        if group.count == 1:
            asked.append((f"where is the {group.name}?", group.place.name))
        turns.append(rng.choice(asked))
    return rng.sample(turns, len(turns))


@cache
def phrases() -> dict[str, str]:
    """Return the answer that each phrase of a question means, longest first."""
    forms = {form(name): name for name in NAMES for form in (plural, str)}
    forms |= {NUMBERS[count]: str(count) for count in COUNTS}
    forms |= {at_place(place): place for place in place_names(0)}
    return dict(sorted(forms.items(), key=lambda form: -len(form[0])))


def words_of(text: str) -> list[str]:
    """Return a text as words; an answer is one word, whatever its form."""
    text = text.rstrip("?")
    for phrase, answer in phrases().items():
        text = re.sub(rf"\b{phrase}\b", answer.replace(" ", "_"), text)
    return [word.replace("_", " ") for word in text.split()]


@cache
def vocabulary() -> dict[str, int]:
    """Return the ids of the special tokens, and of all words and answers."""
    source = EmojiQuestions(300, seed=9)
    texts = [source.text_alone(i).text for i in range(len(source))]
    texts += [text for i in range(len(source)) for text, _ in conversation(source, i)]
    answers = {"yes", "no", *map(str, COUNTS), *place_names(0), *COLOURS, *NAMES}
    words = sorted(answers | {word for text in texts for word in words_of(text)})
    return {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[IMAGE]", *words])}


def padded(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Return rows as one tensor, padded on the right or on the left."""
    side = "left" if left else "right"
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, True, value, side)


def stored_features(source: EmojiQuestions, folder: Path) -> Tensor:
    """Return DINOv2's patch features of the images of a source; a file holds `CHUNK` of them."""
    pixels, parts = source.image_size, []
    model = timm_model(pixels)
    folder.mkdir(parents=True, exist_ok=True)
    for start in track(range(0, len(source), CHUNK), "features"):
        indices = range(start, min(start + CHUNK, len(source)))
        path = folder / f"{pixels}px-{source.seed}-{indices.start}-{indices.stop}.npy"
        if not path.exists():
            unfinished = path.with_suffix(".unfinished.npy")
            np.save(unfinished, encoded(model, source, indices))
            unfinished.rename(path)
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


@torch.inference_mode()
def encoded(model: nn.Module, source: EmojiQuestions, indices: range) -> np.ndarray:
    """Return the features (n, P, 384) fp16 of some images of the source."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    parts = []
    for rows in torch.tensor(indices).split(BATCH):
        arrays = [np.asarray(source[i].images[0].convert("RGB")) for i in rows.tolist()]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        parts.append(model.forward_features((images - mean) / std)[:, 1:].half().numpy())
    return np.concatenate(parts)


class StoredFeatures(nn.Module):
    """An image tower whose pixel values are the features of a frozen one; it adds positions.

    A patch of a smaller image has the mean of the positions that it covers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.5)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Return the features as the hidden states of the last layer."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        trained, side = round(TOKENS**0.5), round(pixel_values.shape[1] ** 0.5)
        grid = self.positions.T.unflatten(1, (trained, trained))
        features = pixel_values + F.adaptive_avg_pool2d(grid, side).flatten(1).T
        return BaseModelOutputWithPooling(features, hidden_states=(features,))


def new_model(seed: int) -> nn.Module:
    """Return a LLaVA of three small layers, whose image tower is `StoredFeatures`."""
    import transformers

    torch.manual_seed(seed)
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6, intermediate_size=WIDTH
    )
    text = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(vocabulary()),
        max_position_embeddings=512,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        initializer_range=0.08,  # 0.02, the default, is for wider models, and learns slowly here
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower = StoredFeatures()
    return model


def prompts(data: Questions, rows: Tensor) -> Tensor:
    """Return (B, T) the ids of image and question, padded on the left."""
    front = torch.tensor([BOS] + [IMAGE] * data.features.shape[1]).expand(len(rows), -1)
    ids = torch.cat((front, data.ids[rows]), 1)
    return ids.gather(1, (ids != PAD).long().argsort(dim=1, stable=True))


def loss_of(model: nn.Module, data: Questions, rows: Tensor) -> Tensor:
    """Return the loss of the answers to the questions, and to those that follow them."""
    asked, answers = prompts(data, rows), data.answers[rows, None]
    longest = int((data.turns[rows] != PAD).sum(1).max())
    ids = torch.cat((asked, answers, data.turns[rows, :longest]), 1)
    unlabelled = torch.full_like(asked, NO_LABEL)
    labels = torch.cat((unlabelled, answers, data.told[rows, :longest]), 1)
    images = data.features[rows].float()
    mask = (ids != PAD).long()
    return model(input_ids=ids, attention_mask=mask, pixel_values=images, labels=labels).loss


def trained(data: Questions, arm: str, seed: int, options: argparse.Namespace) -> nn.Module:
    """Return the model of an arm and a seed, trained now or by an earlier run."""
    model, name = new_model(seed), re.sub(r"\W", "_", arm)
    if arm not in (DENSE, SMALLER):
        reduce_(model, arm, keep=TRAINED_KEEP)
    path = options.folder / f"{name}-{seed}-{len(data.ids)}-{options.steps}.pt"
    if not path.exists():
        train(model, data, seed, options.steps, f"seed {seed}, {arm}")
        torch.save(model.state_dict(), unfinished := path.with_suffix(".unfinished"))
        unfinished.rename(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def train(model: nn.Module, data: Questions, seed: int, steps: int, title: str) -> None:
    """Train the model on the questions."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=WARMUP)
    model.train()
    for _ in track(range(steps), title):
        loss_of(model, data, torch.randint(len(data.ids), (BATCH,))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


@torch.inference_mode()
def is_right(model: nn.Module, data: Questions) -> list[bool]:
    """Return for each question whether the most probable token is the answer."""
    torch.manual_seed(0)
    right = []
    for rows in torch.arange(len(data.ids)).split(BATCH):
        ids, images = prompts(data, rows), data.features[rows].float()
        output = model(input_ids=ids, attention_mask=(ids != PAD).long(), pixel_values=images)
        right += (output.logits[:, -1].argmax(1) == data.answers[rows]).tolist()
    return right


def settings(
    arm: str, model: nn.Module, test: Questions, small: Questions
) -> Iterator[tuple[str, list[bool]]]:
    """Yield the settings in which a trained model is judged, with its right answers."""
    if arm != DENSE:
        yield (
            f"trained with {arm} {TRAINED_KEEP:g}",
            is_right(model, small if arm == SMALLER else test),
        )
        return
    yield DENSE, is_right(model, test)
    for keep in KEEPS:
        for strategy in AFTERWARDS:
            reduce_(model, strategy, keep=keep)
            yield f"{strategy} {keep:g}", is_right(model, test)
            unreduce_(model)
    yield f"{SMALLER} {TRAINED_KEEP:g}", is_right(model, small)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit status."""
    options, console = _parser().parse_args(arguments), Console()
    training = {
        pixels: read_questions(options.questions, 0, options.folder, pixels)
        for pixels in ([PIXELS, PIXELS // 2] if SMALLER in options.arms else [PIXELS])
    }
    test = read_questions(options.evaluated, 1, options.folder)
    small = read_questions(options.evaluated, 1, options.folder, PIXELS // 2)
    right: dict[str, dict[int, list[bool]]] = {}
    for seed in options.seeds:
        for arm in options.arms:
            data = training[PIXELS // 2 if arm == SMALLER else PIXELS]
            model = trained(data, arm, seed, options)
            for name, answers in settings(arm, model, test, small):
                right.setdefault(name, {})[seed] = answers
                console.print(f"seed {seed}: {name}: {np.mean(answers):.3f}")
                write_json(options.output, document(right, options))
    return 0


def document(
    right: dict[str, dict[int, list[bool]]], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the results so far; of a stopped run, some settings have fewer seeds."""
    dense, rows = right[DENSE], []
    kinds = np.arange(options.evaluated) // EmojiQuestions.turns % len(KINDS)
    for name, by_seed in right.items():
        values = np.array(list(by_seed.values()), float)
        other = np.array([dense[seed] for seed in by_seed], float)
        row = {
            "setting": name,
            "accuracy": _interval(values),
            "difference": _interval(values - other),
        }
        row["by_seed"] = values.mean(1).tolist()
        row["by_kind"] = {kind: _interval(values[:, kinds == i]) for i, kind in enumerate(KINDS)}
        rows.append(row)
    sizes = {name: getattr(options, name) for name in ("questions", "evaluated", "steps")}
    measured = {**machine(), "commit": commit(), "date": datetime.date.today().isoformat()}
    return {**measured, **sizes, "seeds": len(dense), "image_tokens": TOKENS, "settings": rows}


def _interval(values: np.ndarray) -> list[float]:
    """Return mean and ends of the interval over questions, of the mean over seeds (S, Q)."""
    return list(bootstrap_interval(values.mean(0)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vlm_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder for features and trained models")
    add("--output", type=Path, required=True, metavar="X.json", help="the results")
    add("--arms", nargs="+", default=ARMS, metavar="ARM", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="default: %(default)s")
    add("--questions", type=int, default=QUESTIONS, help="training images (default: %(default)s)")
    add("--evaluated", type=int, default=EVALUATED, help="for evaluation (default: %(default)s)")
    add("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
