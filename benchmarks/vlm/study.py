"""Train a small LLaVA on generated questions, and remove image tokens from its sequence.

    python -m benchmarks.vlm.study FEATURES --output X.json [--seeds 3] [--questions 30000]

FEATURES is a folder for the features of the images and the trained models; a stopped run continues
behind the last of them. The image tower is DINOv2 ViT-S/14, frozen, at 112 px, and the decoder has
three layers. Each seed trains a model with every token, and removes tokens afterwards, or gives it
a smaller image. Then it trains one model for each setting of `TRAINED` with the tokens removed.
Settings are compared with the model of the same seed that reads every token, paired by question.
"""

import argparse
import datetime
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.vlm.questions import (
    KINDS,
    PIXELS,
    TOKENS,
    WIDTH,
    Questions,
    read_questions,
    vocabulary,
)
from elip_models import reduce_, unreduce_
from elip_models.intervals import bootstrap_interval
from elip_models.profiling.commit import commit
from elip_models.saving.files import write_json

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

KEEPS = (0.5, 0.25, 0.11)
COMPARED = ("random_tokens", "stride", "pool", "diverse", "diverse:relevance=true", "fastv:layer=1")
TRAINED = ("random_tokens", "pool", "diverse")
TRAINED_KEEP = 0.25
SMALL_PIXELS = PIXELS // 2  # a quarter of the tokens
STEPS, BATCH, LR, WARMUP = 4000, 32, 2e-3, 0.1  # warm-up as a share of the steps
QUESTIONS, EVALUATED, EVALUATION_SEED = 30_000, 2000, 1


class StoredFeatures(nn.Module):
    """An image tower whose pixel values are the features of a frozen one; it adds positions.

    A patch of a smaller image has the mean of the positions that it covers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.5)

    def forward(self, pixel_values: Tensor, **_: Any) -> "BaseModelOutputWithPooling":
        """Return the features as the hidden states of the last layer."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        trained, side = round(TOKENS**0.5), round(pixel_values.shape[1] ** 0.5)
        grid = self.positions.T.unflatten(1, (trained, trained))
        positions = nn.functional.adaptive_avg_pool2d(grid, side).flatten(1).T
        features = pixel_values + positions
        return BaseModelOutputWithPooling(features, hidden_states=(features,))


def make_model(words: int) -> nn.Module:
    """Return a LLaVA of three small layers, whose image tower is `StoredFeatures`."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=6, intermediate_size=WIDTH
    )
    text = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=words,
        max_position_embeddings=512,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.08,  # 0.02, the default, is for wider models, and learns slowly here
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=2,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.vision_tower = StoredFeatures()
    return model


def prompts(data: Questions, rows: Tensor) -> Tensor:
    """Return (B, T) the ids of image and question, padded with 0 on the left."""
    front = torch.tensor([1] + [2] * data.features.shape[1]).expand(len(rows), -1)
    ids = torch.cat((front, data.ids[rows]), 1)
    return ids.gather(1, (ids != 0).long().argsort(dim=1, stable=True))


def logits(model: nn.Module, data: Questions, rows: Tensor, ids: Tensor) -> Tensor:
    """Return (B, T, V) the logits of a model that reads `ids` and the images of `rows`."""
    mask, features = (ids != 0).long(), data.features[rows].float()
    return model(input_ids=ids, attention_mask=mask, pixel_values=features).logits


def loss_of(model: nn.Module, data: Questions, rows: Tensor) -> Tensor:
    """Return the loss of the answers, and of those of the questions that follow them."""
    asked, answers = prompts(data, rows), data.answers[rows]
    longest = int((data.turns[rows] != 0).sum(1).max())
    turns, told = data.turns[rows, :longest], data.told[rows, :longest]
    ids = torch.cat((asked, answers.argmax(1, keepdim=True), turns), 1)
    predicted = logits(model, data, rows, ids)[:, asked.shape[1] - 1 : -1]
    answer_loss = nn.functional.cross_entropy(predicted[:, 0], answers)
    further = predicted[:, 1:].flatten(0, 1)
    return answer_loss + nn.functional.cross_entropy(further, told.flatten(), ignore_index=0)


def train(model: nn.Module, data: Questions, seed: int, steps: int, title: str) -> None:
    """Train the model on the questions."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=WARMUP)
    model.train()
    for _ in track(range(steps), title):
        rows = torch.randint(len(data.ids), (BATCH,))
        loss_of(model, data, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()


def train_once(
    model: nn.Module, data: Questions, seed: int, options: argparse.Namespace, arm: str
) -> None:
    """Train the model, or load the weights of an earlier run with these settings."""
    settings = len(data.ids), options.steps, BATCH, LR
    path = options.features / f"{arm.replace(' ', '_')}-{seed}-{'-'.join(map(str, settings))}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        model.eval()
        return
    train(model, data, seed, options.steps, f"seed {seed}, {arm}")
    unfinished = path.with_suffix(".partial")
    torch.save(model.state_dict(), unfinished)
    unfinished.rename(path)


@torch.inference_mode()
def score(model: nn.Module, data: Questions) -> np.ndarray:
    """Return for each question whether the most probable token is a right answer."""
    torch.manual_seed(0)
    is_right = []
    for rows in torch.arange(len(data.ids)).split(BATCH):
        best = logits(model, data, rows, prompts(data, rows))[:, -1].argmax(1, keepdim=True)
        is_right.append(data.answers[rows].gather(1, best)[:, 0] > 0)
    return torch.cat(is_right).numpy().astype(float)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; return the exit status."""
    options, console = _parser().parse_args(arguments), Console()
    training = read_questions(options.questions, 0, options.features)
    test = read_questions(options.evaluated, EVALUATION_SEED, options.features)
    small = read_questions(options.evaluated, EVALUATION_SEED, options.features, SMALL_PIXELS)
    scores: dict[str, list[np.ndarray]] = {}
    for settings in (partial(_afterwards, test=test, small=small), partial(_trained, test=test)):
        for seed in range(options.seeds):
            for name, values in settings(training, seed, options):
                scores.setdefault(name, []).append(values)
                console.print(f"seed {seed}: {name}: {values.mean():.3f}")
                _write(options, scores, test.kinds.numpy())
    console.print(str(options.output))
    return 0


def _new_model(seed: int) -> nn.Module:
    """Return the model of a seed before training."""
    torch.manual_seed(seed)
    return make_model(len(vocabulary()))


def _afterwards(
    training: Questions,
    seed: int,
    options: argparse.Namespace,
    *,
    test: Questions,
    small: Questions,
) -> Iterator[tuple[str, np.ndarray]]:
    """Train with every token; yield settings with fewer, and their scores for each question."""
    model = _new_model(seed)
    train_once(model, training, seed, options, "every token")
    yield "dense", score(model, test)
    for keep in KEEPS:
        for strategy in COMPARED:
            reduce_(model, strategy, keep=keep)
            yield f"{strategy} {keep:g}", score(model, test)
            unreduce_(model)
        if keep * TOKENS == small.features.shape[1]:
            yield f"smaller image {keep:g}", score(model, small)


def _trained(
    training: Questions, seed: int, options: argparse.Namespace, *, test: Questions
) -> Iterator[tuple[str, np.ndarray]]:
    """Train models with fewer tokens; yield the settings, and their scores for each question."""
    for strategy in TRAINED:
        model = reduce_(_new_model(seed), strategy, keep=TRAINED_KEEP)
        train_once(model, training, seed, options, strategy)
        yield f"trained with {strategy} {TRAINED_KEEP:g}", score(model, test)


def _write(options: argparse.Namespace, scores: dict[str, Any], kinds: np.ndarray) -> None:
    """Write what has been measured so far; of a stopped run, some settings have fewer seeds."""
    dense = np.stack(scores["dense"])
    settings = []
    for name, values in scores.items():
        right = np.stack(values)
        row = {"setting": name, "accuracy": _interval(right), "by_seed": right.mean(1).tolist()}
        row["difference"] = _interval(right - dense[: len(right)])
        row["by_kind"] = {kind: _interval(right[:, kinds == i]) for i, kind in enumerate(KINDS)}
        settings.append(row)
    document = {
        **machine(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "questions": options.questions,
        "evaluated": options.evaluated,
        "steps": options.steps,
        "seeds": len(dense),
        "image_tokens": TOKENS,
        "settings": settings,
    }
    write_json(options.output, document)


def _interval(values: np.ndarray) -> list[float]:
    """Return mean and ends of the interval over questions, of the mean over seeds (S, Q)."""
    return list(bootstrap_interval(values.mean(0)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vlm.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("features", type=Path, help="a folder for features and trained models")
    add("--output", type=Path, required=True, metavar="X.json")
    add("--seeds", type=int, default=3, help="models of each kind (default: %(default)s)")
    add("--questions", type=int, default=QUESTIONS, help="training images (default: %(default)s)")
    add("--evaluated", type=int, default=EVALUATED, help="for evaluation (default: %(default)s)")
    add("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
