"""Console output of `python -m benchmarks.studies`: the plan, the progress and the results."""

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.studies.measures import FINETUNED
from benchmarks.studies.page import differences, means, study_page
from benchmarks.studies.results import Document, read_results, write_results
from benchmarks.studies.runner import (
    check_settings,
    check_tree,
    is_finished,
    run_study,
)
from benchmarks.studies.study import Run, Study
from elip_models.pretraining.data import open_source
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.training_data import meta_model
from elip_models.saving.files import write_file
from elip_models.strategies import flops
from elip_models.validation import require_extra

with require_extra("benchmarks.studies"):
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text


class Cost(NamedTuple):
    """Cost of a run.

    strategy: Its name.
    step_flops: FLOPs of a training step of the tower, relative to dense.
    flops: FLOPs of training the tower; 0 for a run that only measures.
    """

    strategy: str
    step_flops: float
    flops: float


class Progress:
    """Progress of a study on the console, and its results file, which is updated after each run."""

    def __init__(
        self,
        study: Study,
        runs: Sequence[Run],
        results: Path,
        console: Console,
        *,
        allow_dirty: bool = False,
    ) -> None:
        self.study, self.runs, self.results, self.console = study, runs, results, console
        self.allow_dirty = allow_dirty

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Return the cost of a run of each arm."""
        one = {run.arm: run for run in self.runs}
        length_of = {arm: self.study.arms[arm].length for arm in one}
        return {arm: _cost(self.study.config(run), length_of[arm]) for arm, run in one.items()}

    def before(self, run: Run) -> None:
        """Print how many runs are done, and which run starts."""
        done = sum(is_finished(self.study, each) for each in self.runs)
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=len(self.runs), completed=done, width=24)
        line.add_row(f"{done}/{len(self.runs)}", bar, f"{run.arm}, seed {run.seed}")
        self.console.print(line)

    def run(self) -> None:
        """Run the study, then print its results."""
        check_settings(self.study, self.runs)
        check_tree(self.study, self.runs, allow_dirty=self.allow_dirty)
        quiet = Console(quiet=True)
        console = self.console if self.console.is_terminal else quiet
        try:
            after = partial(write_results, self.study, self.results)
            run_study(self.study, self.runs, console=console, before=self.before, after=after)
        finally:
            show_results(write_results(self.study, self.results), self.console)

    def plan(self) -> None:
        """Print the arms, the cost of a run of each, and how many runs are finished."""
        shown = Table(title=f"{self.study.name}: {len(self.runs)} runs")
        for name in ("arm", "strategy", "FLOPs of a step", "FLOPs", "finished"):
            shown.add_column(name, overflow="fold")
        if FINETUNED in self.study.measures:
            shown.add_column("fine-tuning", overflow="fold")
        for arm, cost in self.costs.items():
            runs = [run for run in self.runs if run.arm == arm]
            done = f"{sum(is_finished(self.study, run) for run in runs)} of {len(runs)}"
            cells = f"{cost.step_flops:.3f}", f"{cost.flops:.2g}", done
            finetuning = self.study.finetuning(runs[0])
            shown.add_row(arm, cost.strategy, *cells, finetuning and finetuning.task)
        self.console.print(shown)


def _cost(config: RunConfig, length: float) -> Cost:
    model = meta_model(config)
    strategy, size = model.reduction, model.tower.size
    step = flops.strategy_flops(strategy, size).training
    images = _images(config, model.config.image_size) if length else 0
    return Cost(strategy.name, flops.training_ratio(strategy, size), float(step * images))


def _images(config: RunConfig, image_size: int) -> int:
    """Return the number of images that a run trains on, with repetitions."""
    optim = config.optim
    if optim.steps is not None:
        return optim.steps * optim.batch_size * optim.grad_accumulation
    return round(optim.epochs * len(open_source(config.data.train, image_size=image_size)))


def show_results(document: Document, console: Console) -> None:
    """Print the tables of the page."""
    tables = {document["study"]: (means(document), ["95% confidence intervals over seeds"])}
    for reference in document["references"]:
        tables[f"paired differences from {reference}"] = differences(document, reference)
    for title, ((header, rows), notes) in tables.items():
        shown = Table(title=title, caption=" ".join(notes).replace("`", ""))
        for name in header:
            shown.add_column(name, overflow="fold", justify="right" if shown.columns else "left")
        for row in rows:
            cells = (cell.replace("`", "") for cell in row)
            shown.add_row(*(Text(cell.strip("*"), "bold" if "*" in cell else "") for cell in cells))
        if rows:
            console.print(shown)


def write_page(results: Path, path: Path) -> None:
    """Write the Markdown page of one study from its results."""
    write_file(path, study_page(read_results(results)).encode())
