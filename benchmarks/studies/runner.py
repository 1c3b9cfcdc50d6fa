"""Runs of a study. Each is trained and measured once; a killed run resumes at its checkpoint.

    runs/studies/GROUP/tokenizer/              tokenizer of all arms that do not change the data
    runs/studies/GROUP/ARM/SEED/               a run of `elip train`, without checkpoints
    runs/studies/GROUP/ARM/SEED/finetuned/     a run of `elip finetune` with the model of that run
    runs/studies/GROUP/ARM/SEED/result.json    its numbers, written last: the run is finished
    runs/studies/GROUP/ARM/SEED.lock           locked by the process that works on the run

Several processes can work on one study: each takes runs that no other process has locked. A new
measure of a study is also computed for its finished runs, from their saved models.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.studies.measures import FINETUNED, Finished, measure
from benchmarks.studies.study import Run, Study
from elip_models.pretraining.data import load_tokenizer, open_source, train_tokenizer
from elip_models.pretraining.models.registry import load_model
from elip_models.pretraining.training.recipe import load_recipe, resume_conflicts, save_recipe
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.trainer import train
from elip_models.pretraining.training.training_data import meta_model, tokenizer_captions
from elip_models.profiling.commit import commit
from elip_models.profiling.measure import measured_on
from elip_models.profiling.runner import DENSE
from elip_models.profiling.runner import measure as profile
from elip_models.profiling.workload import Workload
from elip_models.saving.files import read_object, write_json
from elip_models.saving.saved_folder import publish, unfinished
from elip_models.strategies import flops
from elip_models.validation import (
    ConfigError,
    Stopped,
    TrainingError,
    as_config_error,
    require_extra,
)

with require_extra("benchmarks.studies"):
    from filelock import FileLock, Timeout
    from rich.console import Console

LAST_STEPS = 50  # steps whose losses are averaged
RESULT = "result.json"
Result = dict[str, Any]


def run_study(
    study: Study,
    runs: Sequence[Run],
    *,
    console: Console,
    before: Callable[[Run], None],
    after: Callable[[], object],
) -> None:
    """Perform, in order, all runs that are not finished and not locked by another process.

    Args:
        study: The study.
        runs: Runs of `plan`.
        console: Console for the progress of training.
        before: Called with each run before this process performs it.
        after: Called after each run that this process performed.

    Raises:
        ConfigError: see `check_settings`.
        TrainingError: runs failed; it is raised after all other runs.
        Stopped: a signal ended the run in progress.
    """
    failed: dict[Run, TrainingError] = {}
    while (found := _next(study, [run for run in runs if run not in failed])) is not None:
        run, lock = found
        with lock:
            before(run)
            try:
                perform(study, run, console)
            except Stopped:
                raise
            except TrainingError as error:
                failed[run] = error
            after()
    if failed:
        errors = "; ".join(f"{run.arm}, seed {run.seed}: {error}" for run, error in failed.items())
        raise TrainingError(f"{len(failed)} runs failed: {errors}")


def result_of(study: Study, run: Run) -> Result | None:
    """Return the numbers of a finished run, or None."""
    path = study.folder(run) / RESULT
    with as_config_error("result"):
        return read_object(path) if path.is_file() else None


def is_finished(study: Study, run: Run) -> bool:
    """Return True if the run has all measures of the study."""
    result = result_of(study, run)
    return result is not None and set(study.measures) <= set(result["measures"])


def perform(study: Study, run: Run, console: Console) -> None:
    """Train the run unless its arm has length 0, measure it, and write the result."""
    start = time.monotonic()
    config, result = study.config(run), result_of(study, run)
    folder = RunFolder(config.output_dir)
    folder.path.mkdir(parents=True, exist_ok=True)
    if result is None:
        _make_tokenizer(study, config)
        if study.arms[run.arm].length:
            train(config, resume=True, console=console)
        else:
            save_recipe(config, folder.recipe)
        result = {**run._asdict(), "beginning": _beginning(study, run)}
        result |= {**_cost(config, folder), **_origin()}
        result |= {"seconds": 0.0, "measures": [], "metrics": {}}
    missing = tuple(name for name in study.measures if name not in result["measures"])
    finished = _open(study, run, config, console)
    if study.arms[run.arm].length and "step_time" not in result:
        result["step_time"] = step_time(finished)
    found = measure(finished, missing)
    result["metrics"] |= {name: round(value, 6) for name, value in found.items()}
    result["measures"] += missing
    result["seconds"] = round(result["seconds"] + time.monotonic() - start, 1)
    write_json(folder.path / RESULT, result)
    shutil.rmtree(folder.checkpoints.path, ignore_errors=True)


def _next(study: Study, runs: Sequence[Run]) -> tuple[Run, FileLock] | None:
    """Return the first run that can be performed now, and its acquired lock."""
    for run in runs:
        parent = study.arms[run.arm].parent
        is_ready = parent is None or result_of(study, Run(parent, run.seed)) is not None
        if is_finished(study, run) or not is_ready:
            continue
        path = study.folder(run).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if not is_finished(study, run):  # another process may have finished it meanwhile
            return run, lock
        lock.release()
    return None


def check_settings(study: Study, runs: Sequence[Run]) -> None:
    """Raise ConfigError for an invalid arm, or for a result that was made with other settings."""
    for run in runs:
        config, finetuning = study.config(run), study.finetuning(run)
        result = result_of(study, run)
        if result is None:
            continue
        _check_recipe(study.folder(run), config)
        if FINETUNED in result["measures"] and finetuning is not None:
            _check_recipe(study.finetuned(run), finetuning)
        beginning, then = _beginning(study, run), result.get("beginning")
        if None not in (beginning, then) and beginning != then:
            raise ConfigError(
                f"{study.folder(run)} began with an older run of {study.arms[run.arm].parent!r}, "
                "which was trained again since; remove it"
            )


def _check_recipe(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError unless the finished run in `folder` has this recipe."""
    if changes := resume_conflicts(load_recipe(folder / "recipe.yaml"), config, ()):
        raise ConfigError(
            f"{folder} was made with other settings: {'; '.join(changes)}; remove it, or give the "
            "study another name"
        )


def check_tree(study: Study, runs: Sequence[Run], *, allow_dirty: bool) -> None:
    """Raise ConfigError if runs are left and would measure code that no commit has.

    The result of each run has the commit, and a mark if there were uncommitted changes.
    """
    left = any(not is_finished(study, run) for run in runs)
    if left and commit().get("dirty", False) and not allow_dirty:
        raise ConfigError(
            "study: expected a checkout without uncommitted changes, got changes to commit "
            f"{commit()['id'][:7]}; commit them, or pass --allow-dirty, which marks the results"
        )


def _make_tokenizer(study: Study, config: RunConfig) -> None:
    """Train the shared tokenizer if this run uses it and it does not exist yet."""
    path = study.tokenizer
    if config.data.tokenizer != str(path):
        return
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            model = meta_model(config).config
            with as_config_error("data.train"):
                source = open_source(config.data.train, image_size=model.image_size)
            captions = tokenizer_captions(source, model)
            with as_config_error("data.vocab_size"):
                tokenizer = train_tokenizer(captions, config.data.vocab_size)
            tokenizer.save_pretrained(unfinished(path))
            publish(path)


def _open(study: Study, run: Run, config: RunConfig, console: Console) -> Finished:
    """Load the model of a run; for an arm of length 0, its parent's with its strategy."""
    arm, folder, reduction = study.arms[run.arm], RunFolder(config.output_dir), {}
    if arm.length == 0:
        folder = RunFolder(study.folder(Run(arm.parent, run.seed)))
        reduction = study.reduction(run)
    with as_config_error(f"arms.{run.arm}"):
        model = load_model(folder.model, **reduction).to(_device()).eval()
    tokenizer = load_tokenizer(str(folder.model))
    return Finished(config, model, tokenizer, study.finetuning(run), console)


def _beginning(study: Study, run: Run) -> float | None:
    """Return the final loss of the first ancestor, which identifies the model a run begins with.

    None if the run begins from scratch, or if its parent has no result.
    """
    parent = study.arms[run.arm].parent
    result = result_of(study, Run(parent, run.seed)) if parent is not None else None
    if result is None:
        return None
    own = result.get("loss")
    return own if result.get("beginning") is None else result["beginning"]


def step_time(run: Finished) -> float:
    """Measure the time of a training step, forward and backward, relative to the dense model."""
    workload = Workload(run.model, run.config.optim.batch_size)
    arms = {DENSE: None, "arm": run.model.reduction}
    return round(profile(workload, arms, "training")["arm"].time_ratio, 4)


def _cost(config: RunConfig, folder: RunFolder) -> Result:
    """Return relative FLOPs of a training step (of a forward without training), images and loss."""
    model, optim = meta_model(config), config.optim
    rows = [row for row in folder.rows() if "loss" in row]
    ratio_of = flops.training_ratio if rows else flops.inference_ratio
    ratio = ratio_of(model.reduction, model.tower.size)
    cost = {"strategy": str(model.reduction), "step_flops": round(ratio, 4)}
    if not rows:
        return cost
    steps, batch = rows[-1]["step"], optim.batch_size * optim.grad_accumulation
    last = [row["loss"] for row in rows if row["step"] > steps - LAST_STEPS]
    return cost | {"images": steps * batch, "loss": round(fmean(last), 5)}


def _origin() -> Result:
    """Return device, versions and commit of a result."""
    return {"measured_on": measured_on(_device()), "commit": commit()}


def _device() -> torch.device:
    """Return the device on which runs are trained and measured."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
