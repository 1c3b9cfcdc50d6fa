"""Fine-tune DINOv2 on photographs of clothes with fewer tokens: accuracy against cost.

    python -m benchmarks.real.finetune FOLDER --output X.json
    python -m benchmarks.real.finetune FOLDER --output X.json --time

The first command trains every arm with every seed and stores each run when it has ended; called
again, it goes on with the runs that are missing. The second adds the time of a training step of
each arm relative to dense; run it while nothing else runs. `materials.py` says what FOLDER holds.

An arm is a strategy and `keep`, as 'merge 0.5'. With `+ finish`, the last tenth of its steps is
dense. 'dense 0.5' trains densely for half of the steps: the comparison at equal cost. Each run is
evaluated at its end, on the validation and test splits together: with the dense model, and with the
reduced one.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import elip_models
from benchmarks.real import dinov2, materials
from benchmarks.real.dinov2 import MEAN, STD
from benchmarks.real.tasks import measured_on
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

DENSE, FINISH = "dense", " + finish"
STRATEGIES, KEEPS = ("merge", "resize", "evit", "elip", "random"), (0.7, 0.5)
ARMS = (
    DENSE,
    *(f"{DENSE} {share}" for share in KEEPS),
    *(
        f"{strategy} {keep}{finish}"
        for keep in KEEPS
        for strategy in STRATEGIES
        for finish in ("", FINISH)
    ),
)
BATCH, EVALUATION_BATCH = 16, 50
RATE, HEAD_RATE, DECAY, WARMUP = 2e-5, 1e-3, 0.05, 0.1
FINISH_SHARE = 0.1


class Arm(NamedTuple):
    """How a run reduces.

    strategy, keep: of `reduce_`; None trains densely.
    finish: the last tenth of the steps is dense.
    share: of the steps that are taken.
    """

    strategy: str | None = None
    keep: float | None = None
    finish: bool = False
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Return the arm that a text such as 'merge 0.5 + finish' or 'dense 0.5' names."""
        strategy, _, number = text.removesuffix(FINISH).partition(" ")
        if strategy == DENSE:
            return cls(share=float(number or 1.0))
        return cls(strategy, float(number), text.endswith(FINISH))

    def apply(self, model: nn.Module) -> None:
        """Reduce the model."""
        if self.strategy is not None:
            elip_models.reduce_(model, strategy=self.strategy, keep=self.keep)


class Clothes(NamedTuple):
    """Decoded photographs, the shorter side resized to `pixels` times 1.15, and their labels."""

    images: list[Image.Image]
    labels: Tensor
    pixels: int

    @classmethod
    def read(cls, folder: Path, splits: Sequence[str], pixels: int) -> "Clothes":
        """Read splits of the clothes."""
        parts = [materials.clothes(folder, split) for split in splits]
        resize = T.Resize(round(1.15 * pixels), T.InterpolationMode.BICUBIC, antialias=True)
        paths = [path for part in parts for path in part.paths]
        images = [resize(Image.open(path).convert("RGB")) for path in paths]
        return cls(images, torch.cat([part.labels for part in parts]), pixels)

    def batch(self, chosen: Tensor, augmented: bool) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, S) and labels (B,)."""
        crop: list[nn.Module] = [T.CenterCrop(self.pixels)]
        if augmented:
            crop = [T.RandomResizedCrop(self.pixels, (0.5, 1.0)), T.RandomHorizontalFlip()]
        last = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)]
        transform = T.Compose([*crop, *last])
        images = torch.stack([transform(self.images[i]) for i in chosen.tolist()])
        return images, self.labels[chosen]


class Classifier(nn.Module):
    """DINOv2 and a linear layer on its class token."""

    def __init__(self, pixels: int, classes: int) -> None:
        """Load the pretrained weights for images of `pixels`."""
        super().__init__()
        self.tower = dinov2.timm_model(pixels)
        self.head = nn.Linear(self.tower.num_features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) of images (B, 3, S, S)."""
        return self.head(self.tower(images))

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW, with a higher rate for the new layer."""
        groups = [
            {"params": self.tower.parameters(), "lr": RATE},
            {"params": self.head.parameters(), "lr": HEAD_RATE},
        ]
        return torch.optim.AdamW(groups, weight_decay=DECAY)


def train(
    arm: Arm, seed: int, train_set: Clothes, held_out: Clothes, steps: int
) -> dict[str, float]:
    """Return the top-1 accuracy on `held_out` of the dense model, and of the reduced one."""
    torch.manual_seed(seed)
    model = Classifier(train_set.pixels, int(train_set.labels.max()) + 1).train()
    optimizer, steps = model.optimizer(), round(steps * arm.share)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=WARMUP,
    )
    arm.apply(model.tower)
    for step in range(steps):
        if arm.finish and step == round(steps * (1 - FINISH_SHARE)):
            elip_models.unreduce_(model.tower)
        images, labels = train_set.batch(torch.randint(len(train_set.labels), (BATCH,)), True)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    elip_models.unreduce_(model.eval().tower)
    scores = {"dense": top1(model, held_out)}
    if arm.strategy is not None:
        arm.apply(model.tower)
        scores["reduced"] = top1(model, held_out)
    return scores


@torch.no_grad()
def top1(model: Classifier, held_out: Clothes) -> float:
    """Return the share of photographs whose class is right."""
    correct = 0
    for chosen in torch.arange(len(held_out.labels)).split(EVALUATION_BATCH):
        images, labels = held_out.batch(chosen, False)
        correct += int((model(images).argmax(1) == labels).sum())
    return round(correct / len(held_out.labels), 5)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train the runs that `--output` lacks; return all results."""
    train_set = Clothes.read(options.folder, ["train"], options.pixels)
    held_out = Clothes.read(options.folder, ["validation", "test"], options.pixels)
    settings = {
        "pixels": options.pixels,
        "steps": options.steps,
        "batch": BATCH,
        "train": len(train_set.labels),
        "held_out": len(held_out.labels),
    }
    document = {**measured_on(), "settings": settings, "runs": []}
    if options.output.is_file():
        document = read_object(options.output)
        if document["settings"] != settings:
            raise ValueError(
                f"output: expected results of {settings}, got those of {document['settings']}; "
                "name another file"
            )
    ended = {(row["arm"], row["seed"]) for row in document["runs"]}
    missing = [(arm, seed) for seed in options.seeds for arm in options.arms]
    missing = [pair for pair in missing if pair not in ended]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for arm, seed in progress.track(missing, description="runs"):
            scores = train(Arm.parse(arm), seed, train_set, held_out, options.steps)
            document["runs"].append({"arm": arm, "seed": seed, "scores": scores})
            write_json(options.output, document)
    return document


def timed(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results in `--output` with the time of a training step relative to dense."""
    document = read_object(options.output)
    pixels = document["settings"]["pixels"]
    batch = torch.randn(BATCH, 3, pixels, pixels), torch.randint(2, (BATCH,))
    arms = dict.fromkeys(row["arm"].removesuffix(FINISH) for row in document["runs"])
    arms = [arm for arm in arms if Arm.parse(arm).share == 1]
    steps = {arm: partial(_step, *_trainable(arm, pixels), *batch) for arm in arms}
    times = time_side_by_side(steps, device=torch.device("cpu"), rounds=options.rounds)
    ratios = {arm: round(ratio, 4) for arm, ratio in ratios_to(DENSE, times).items()}
    measured = {**measured_on(), "rounds": options.rounds}
    return document | {"time": measured | {"ratios": ratios, "milliseconds": milliseconds(times)}}


def _trainable(arm: str, pixels: int) -> tuple[Classifier, torch.optim.Optimizer]:
    model = Classifier(pixels, 2).train()
    Arm.parse(arm).apply(model.tower)
    return model, model.optimizer()


def _step(
    model: Classifier, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        check_output("--output", options.output)
        document = timed(options) if options.time else run(options, Console())
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    write_json(options.output, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    add("--output", type=Path, required=True, metavar="X.json", help="the results")
    add("--arms", nargs="+", default=ARMS, metavar="ARM", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="default: %(default)s")
    add("--pixels", type=int, default=112, help="side of an image (default: %(default)s)")
    add("--steps", type=int, default=300, help="of a run (default: %(default)s)")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=11, help="with --time, interleaved (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
