"""Train a pretrained model with fewer tokens: arms, seeds, results that continue, and times.

An arm is a strategy and `keep`, as 'merge 0.5'. 'dense 0.5' trains densely for half of the steps,
and 'dense 0' not at all. A reduced run has two ends, which share nine tenths of the steps: in the
last tenth it stays reduced ('reduced'), or it is dense ('finished', as in Li et al., CLIPA, NeurIPS
2023). Each end is judged as the dense model and as the reduced one.
"""

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torchvision.transforms.v2 as T
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import elip_models
from benchmarks.machine import provenance
from benchmarks.real.dinov2 import MEAN, STD
from benchmarks.real.tasks import PACKAGES
from elip_models.profiling.measure import milliseconds, ratios_to, time_side_by_side
from elip_models.saving.files import read_object, write_json
from elip_models.validation import check_output

DENSE, REDUCED, FINISHED = "dense", "reduced", "finished"
DECAY, WARMUP, FINISH = 0.05, 0.1, 0.1
EVALUATION_BATCH = 50


class Arm(NamedTuple):
    """How a run reduces.

    strategy, keep: of `reduce_`; None trains densely.
    share: of the steps that are taken.
    """

    strategy: str | None = None
    keep: float | None = None
    share: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the arm that a text such as 'merge 0.5' or 'dense 0.5' names."""
        strategy, _, number = text.rpartition(" ")
        if text.partition(" ")[0] == DENSE:
            return cls(share=float(number) if strategy else 1.0)
        return cls(strategy, float(number))


class Learner(nn.Module, ABC):
    """A model that is trained, with a tower that can be reduced.

    guided: the reduction reads a text.
    """

    tower: nn.Module
    guided = False

    def reduce(self, arm: Arm) -> None:
        """Reduce the tower as the arm says; make it dense if the arm is."""
        elip_models.unreduce_(self.tower)
        self.guided = False
        if arm.strategy is not None:
            elip_models.reduce_(self.tower, strategy=arm.strategy, keep=arm.keep)
            self.guided = elip_models.reduction_summary(self.tower).strategy.is_guided

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups of parameters, each with its highest learning rate."""

    @abstractmethod
    def loss(self, *batch: Tensor) -> Tensor:
        """Return the loss of a batch of the study."""


class Study(ABC):
    """Photographs, a model and what is measured of it."""

    arms: ClassVar[Sequence[str]]
    batch_size: ClassVar[int]
    steps: ClassVar[int]

    def __init__(self, folder: Path, pixels: int) -> None:
        """Read the materials in `folder`, for images of `pixels`."""
        self.folder, self.pixels = folder, pixels

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the numbers of photographs for training and for evaluation."""

    @abstractmethod
    def learner(self) -> Learner:
        """Return a new model with the pretrained weights."""

    @abstractmethod
    def batch(self) -> tuple[Tensor, ...]:
        """Draw a batch."""

    @abstractmethod
    def scores(self, learner: Learner) -> dict[str, float]:
        """Return the measures of a model in eval mode."""


class Photographs(NamedTuple):
    """Decoded photographs, the shorter side resized to `pixels` times 1.15."""

    images: list[Image.Image]
    pixels: int
    smallest_crop: float

    @classmethod
    def read(cls, paths: Sequence[Path], pixels: int, smallest_crop: float = 1.0) -> Self:
        """Read photographs; `smallest_crop` is the least share of an image in training."""
        resize = T.Resize(round(1.15 * pixels), T.InterpolationMode.BICUBIC, antialias=True)
        images = [resize(Image.open(path).convert("RGB")) for path in paths]
        return cls(images, pixels, smallest_crop)

    def batch(self, chosen: Tensor, augmented: bool = False) -> Tensor:
        """Return images (B, 3, S, S), normalised; augmented by a random crop and a flip."""
        crop: list[nn.Module] = [T.CenterCrop(self.pixels)]
        if augmented:
            share = (self.smallest_crop, 1.0)
            crop = [T.RandomResizedCrop(self.pixels, share), T.RandomHorizontalFlip()]
        last = [T.ToImage(), T.ToDtype(torch.float32, scale=True), T.Normalize(MEAN, STD)]
        transform = T.Compose([*crop, *last])
        return torch.stack([transform(self.images[i]) for i in chosen.tolist()])


class Optimization:
    """AdamW with one cycle of the learning rate."""

    def __init__(self, learner: Learner, steps: int) -> None:
        """Begin `steps` steps."""
        groups = learner.groups()
        self.learner = learner
        self.optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=[group["lr"] for group in groups],
            total_steps=steps,
            pct_start=WARMUP,
        )

    def run(self, study: Study, steps: int) -> None:
        """Take steps on batches that the study draws."""
        for _ in range(steps):
            self.step(study.batch())

    def step(self, batch: Sequence[Tensor]) -> None:
        """Take one step."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.learner.loss(*batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def state(self) -> list[Any]:
        """Return a copy of everything that the next steps depend on."""
        parts = (self.learner, self.optimizer, self.schedule)
        return [torch.get_rng_state(), *(copy.deepcopy(part.state_dict()) for part in parts)]

    def load(self, state: list[Any]) -> None:
        """Go back to a state."""
        torch.set_rng_state(state[0])
        parts = (self.learner, self.optimizer, self.schedule)
        for part, stored in zip(parts, state[1:], strict=True):
            part.load_state_dict(copy.deepcopy(stored))


Scores = dict[str, dict[str, float]]
"""Of the dense model, and of the reduced one."""


def train(study: Study, arm: Arm, seed: int, steps: int) -> dict[str, Scores]:
    """Return the scores of each end of a run."""
    torch.manual_seed(seed)
    learner, steps = study.learner(), round(steps * arm.share)
    if not steps:
        return {DENSE: _scores(study, learner, arm)}
    optimization, last = Optimization(learner, steps), round(steps * FINISH)
    learner.train().reduce(arm)
    optimization.run(study, steps - last)
    state, ends = optimization.state(), {}
    for end, ending in {REDUCED: arm, FINISHED: Arm()}.items() if arm.strategy else [(DENSE, arm)]:
        optimization.load(state)
        learner.train().reduce(ending)
        optimization.run(study, last)
        ends[end] = _scores(study, learner, arm)
    return ends


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def _scores(study: Study, learner: Learner, arm: Arm) -> Scores:
    learner.eval().reduce(Arm())
    scores = {DENSE: study.scores(learner)}
    if arm.strategy is not None:
        learner.reduce(arm)
        scores[REDUCED] = study.scores(learner)
    return scores


def run(study: Study, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train the runs that `--output` lacks; return all results."""
    settings = {
        "pixels": options.pixels,
        "steps": options.steps,
        "batch": study.batch_size,
        "matrix_products": "bf16",
        **study.sizes(),
    }
    document = {**provenance(PACKAGES), "settings": settings, "runs": []}
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
            ends = train(study, Arm.parse(arm), seed, options.steps)
            document["runs"].append({"arm": arm, "seed": seed, "ends": ends})
            write_json(options.output, document)
    return document


def timed(study: Study, options: argparse.Namespace) -> dict[str, Any]:
    """Return the results in `--output` with the time of a training step relative to dense."""
    document = read_object(options.output)
    arms = dict.fromkeys(row["arm"] for row in document["runs"])
    batch, steps = study.batch(), {}
    for text in (text for text in arms if Arm.parse(text).share == 1):
        learner = study.learner().train()
        learner.reduce(Arm.parse(text))
        steps[text] = partial(Optimization(learner, 10**6).step, batch)
    times = time_side_by_side(steps, device=torch.device("cpu"), rounds=options.rounds)
    ratios = {arm: round(ratio, 4) for arm, ratio in ratios_to(DENSE, times).items()}
    measured = {**provenance(PACKAGES), "rounds": options.rounds}
    return document | {"time": measured | {"ratios": ratios, "milliseconds": milliseconds(times)}}


def main(
    study: type[Study], command: str, description: str, arguments: Sequence[str] | None
) -> int:
    """Run the command of a study; return the exit status."""
    parser = _parser(study, command, description)
    options = parser.parse_args(arguments)
    try:
        check_output("--output", options.output)
        this = study(options.folder, options.pixels)
        document = timed(this, options) if options.time else run(this, options, Console())
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    write_json(options.output, document)
    return 0


def _parser(study: type[Study], command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="the materials, see benchmarks/real/materials.py")
    add("--output", type=Path, required=True, metavar="X.json", help="the results")
    add("--arms", nargs="+", default=study.arms, metavar="ARM", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=(0, 1, 2), help="default: %(default)s")
    add("--pixels", type=int, default=112, help="side of an image (default: %(default)s)")
    add("--steps", type=int, default=study.steps, help="of a run (default: %(default)s)")
    add("--time", action="store_true", help="measure times alone, and add them to --output")
    add("--rounds", type=int, default=11, help="with --time, interleaved (default: %(default)s)")
    return parser
