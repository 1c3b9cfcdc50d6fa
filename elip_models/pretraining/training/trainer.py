"""Training with `accelerate`, with the same code for one process and for several under `torchrun`.

A checkpoint is written between two optimiser steps. The order of the data is a function of seed and
epoch. The position in it and the learning rate are functions of the step. So a run that was killed
and resumed computes the same as one that was not. A checkpoint also contains the position in a
stream (`train_batches`).
"""

import math
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from elip_models.integrations.peft.adapt import trainable_counts
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.tasks.task import TaskScores
from elip_models.pretraining.training.accelerator import (
    expected_warnings_ignored,
    make_accelerator,
)
from elip_models.pretraining.training.evaluation import VALIDATION, Evaluation
from elip_models.pretraining.training.loss_log import LossLog, losses_of
from elip_models.pretraining.training.model import make_model
from elip_models.pretraining.training.optim import learning_rate
from elip_models.pretraining.training.replicated import ReplicatedModel
from elip_models.pretraining.training.run_checkpoints import step_of
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import RunFolder, as_write_error, run_provenance
from elip_models.pretraining.training.sharded import ShardedModel, check_sharding
from elip_models.pretraining.training.signal_handling import StopSignal
from elip_models.pretraining.training.summary import TrainResult, print_plan, progress_bar
from elip_models.pretraining.training.train_batches import make_train_batches
from elip_models.pretraining.training.training_data import (
    make_tokenizer,
    meta_model,
    open_training_data,
    task_of,
)
from elip_models.profiling.measure import saved_bytes
from elip_models.rank_barrier import RankBarrier
from elip_models.saving.files import unfinished
from elip_models.validation import Stopped, TrainingError, as_config_error, require_extra

with require_extra("elip_models.pretraining.training"):
    from accelerate.utils import broadcast_object_list, set_seed
    from rich.console import Console
    from rich.markup import escape


def train(
    config: RunConfig, *, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Train a model by a recipe and save it in `output_dir/model`.

    Args:
        config: The recipe of the run.
        resume: Continue from the newest checkpoint of `output_dir`, or start if there is none.
        console: Where progress is shown; None shows nothing.

    Raises:
        TypeError: `config` is not a RunConfig.
        ConfigError: A setting that does not fit the data, the model or the machine.
        TrainingError: `output_dir` contains a run or is in use, the resumed run has another recipe,
            all checkpoints are damaged, the disk is full, or the loss is not finite.
        Stopped: SIGTERM or SIGINT was received, and a checkpoint of the last step was written.
        DataError: The data cannot be read, or too many samples cannot.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(f"config: expected a RunConfig from load_recipe, got {config!r:.100}")
    trainer = Trainer(config, resume=resume, console=console or Console(quiet=True))
    with as_write_error(trainer.folder.path):
        return trainer.run()


class Trainer:
    """One training run, with the arguments of `train`.

    It uses only the interface of `PretrainedModel`. All processes call every method together.
    """

    def __init__(self, config: RunConfig, *, resume: bool, console: Console) -> None:
        self.config, self.resume = config, resume
        self.folder = RunFolder(config.output_dir)
        self.accelerator = make_accelerator(config, self.folder)
        if config.optim.shard:
            check_sharding(config, self.accelerator.num_processes)
        self.barrier = RankBarrier()
        self.is_main = self.accelerator.is_main_process
        self.console = console if self.is_main else Console(quiet=True)

    def run(self) -> TrainResult:
        """Prepare the run, train to the last step, save the model and return the result."""
        locked = self.folder.locked(self.config, resume=self.resume)
        with (
            self.barrier.reporting(),
            locked if self.is_main else nullcontext(),
            expected_warnings_ignored(),
        ):
            self.prepare()
            with progress_bar(self.console) as self.bars:
                self._train()
                return self._finish()

    def prepare(self) -> None:
        """Open data, build the model, restore the checkpoint and write the recipe to the folder."""
        if self.is_main:
            self.folder.prepare()
            device, count = self.accelerator.device.type, self.accelerator.num_processes
            print_plan(self.config, self.console, device=device, num_processes=count)
        self.barrier.wait()
        checkpoint = self._newest_checkpoint() if self.resume else None
        self._open_data()
        self._build_model(resumed=checkpoint is not None)
        self.barrier.wait()
        if self.is_main:
            self.folder.record_start(self.config, run_provenance(len(self.source), checkpoint))
        self._restore(checkpoint)
        self.barrier.wait()

    def _newest_checkpoint(self) -> Path | None:
        latest = self.folder.checkpoints.latest(self._warn) if self.is_main else None
        self.barrier.wait()
        return broadcast_object_list([latest])[0]

    def _warn(self, line: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {escape(line)}", soft_wrap=True)

    def _open_data(self) -> None:
        data, optim = self.config.data, self.config.optim
        model = meta_model(self.config).config
        family, task = family_of(self.config.model.name, self.config.task), task_of(self.config)
        with as_config_error("data.train", inner="spec"):
            self.source = open_training_data(self.config, model.image_size)
        self.evaluation = Evaluation(self.config, model.image_size, self.folder.best)
        self.tokenizer = make_tokenizer(
            self.config, self.source, model, self.folder, self.barrier, self.console
        )
        with as_config_error("data.tokenizer"):
            self.text_sizes = family.fit_tokenizer(self.tokenizer, data.context_length)
        if task is not None:
            self.text_sizes |= task.fields(self.source, model)
            self.evaluation.answers = getattr(self.source, "answers", None)
        self.batches = make_train_batches(
            self.config, model, self.source, self.tokenizer, self.accelerator
        )
        self.steps_per_epoch = self.batches.batches_per_epoch / optim.grad_accumulation
        self.total_steps = optim.steps or math.ceil((optim.epochs or 0) * self.steps_per_epoch)
        self.learning_rate = partial(
            learning_rate,
            optim=optim,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _build_model(self, *, resumed: bool) -> None:
        """Create model and optimiser, with the same weights but different dropout on each rank."""
        optim, seed = self.config.optim, self.config.seed
        set_seed(seed)
        model = make_model(
            self.config,
            self.tokenizer,
            self.text_sizes,
            num_processes=self.accelerator.num_processes,
            resumed=resumed,
            console=self.console,
        )
        self.barrier.wait()  # the next line communicates
        parallel_class = ShardedModel if optim.shard else ReplicatedModel
        self.parallel = parallel_class(self.accelerator, model, optim)
        self.model = self.parallel.model
        trained, total = trainable_counts(self.model)
        self.first_row = {"trainable": trained, "trainable_share": round(trained / total, 6)}
        set_seed(seed, device_specific=True)

    def _restore(self, checkpoint: Path | None) -> None:
        self.step = step_of(checkpoint, **self._invariants()) if checkpoint else 0
        self.first_step = self.step
        self.batches.start(self.step * self.config.optim.grad_accumulation, checkpoint)
        if checkpoint is not None:
            self.parallel.load(checkpoint)
        if self.is_main:
            self.folder.truncate_rows(self.step)
        losses = [row["loss"] for row in self.folder.rows() if "loss" in row]
        self.loss = losses[-1] if losses else math.nan
        self.losses = LossLog(self.accelerator, max_nonfinite=self.config.optim.max_nonfinite_steps)
        purge = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers(self.config.name, init_kwargs=purge)

    def _invariants(self) -> dict[str, int | list[int]]:
        return {"num_processes": self.accelerator.num_processes, **self.batches.invariants()}

    def _train(self) -> None:
        self.model.train()
        self._restart_timer()
        counts = {"total": self.total_steps, "completed": self.step}
        bar = self.bars.add_task("", **counts, unit="step")
        with StopSignal() as stop:
            while self.step < self.total_steps:
                self._train_step()
                self.bars.update(bar, completed=self.step)
                if is_logged := self._due(self.config.log_every):
                    self.bars.update(bar, description=self._log_step())
                is_last = self.step == self.total_steps
                if not is_last:  # `_finish` evaluates after the last checkpoint
                    self._log_scores()
                is_stopped = stop.received(self.accelerator, may_wait=is_logged)
                if is_stopped or self._due(self.config.checkpoint_every):
                    self._save_checkpoint()
                if is_stopped and not is_last:
                    raise Stopped(
                        f"{self.folder.path}: {signal.Signals(stop.signal).name} ended the run "
                        f"after step {self.step} of {self.total_steps}, with a checkpoint: "
                        "continue it with --resume",
                        stop.signal,
                    )

    def _train_step(self) -> None:
        self.model.begin_step(self.step, self.step / self.steps_per_epoch)
        optim, accelerator = self.config.optim, self.accelerator
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["lr_scale"]
        losses = []
        for _ in range(optim.grad_accumulation):
            tensors = self.batches.next_batch()
            tensors = {n: t.to(accelerator.device, non_blocking=True) for n, t in tensors.items()}
            with self.parallel.accumulate():
                output = self._forward(tensors)
                accelerator.backward(output.loss)
            losses.append(losses_of(output))
        self.losses.add(losses, self.parallel.step_(optim.max_grad_norm))
        self.step += 1

    def _forward(self, tensors: dict[str, Tensor]) -> Any:
        """Return the output; an uncompiled run of one process first counts the saved bytes."""
        is_counted = self.accelerator.num_processes == 1 and not self.config.optim.compile
        if self.step > self.first_step or not is_counted:
            return self.parallel.forward(**tensors)
        with saved_bytes(self.model.parameters()) as count:
            output = self.parallel.forward(**tensors)
        self.first_row["saved_bytes"] = count()
        return output

    def _log_step(self) -> str:
        """Log the steps since the row before, and return what the progress bar shows of them."""
        row, optim = self._read_losses(), self.config.optim
        images = optim.grad_accumulation * optim.batch_size * self.accelerator.num_processes
        seconds = (time.perf_counter() - self.timer_start) / (self.step - self.timer_step)
        monitored = {name: value.item() for name, value in self.model.monitored().items()}
        own = {"lr": self.learning_rate(self.step - 1)}
        own["images_per_second"] = round(images / seconds, 2)
        self._log(row | own | self.first_row | monitored)
        self.first_row = {}
        parts = (f"{n[5:]} {v:.3f}" for n, v in row.items() if n.startswith("loss_"))
        status = "  ".join([f"loss {self.loss:.3f}", *parts, f"{images / seconds:.0f} images/s"])
        if not self.console.is_terminal:
            left = timedelta(seconds=round((self.total_steps - self.step) * seconds))
            self.console.print(f"step {self.step}/{self.total_steps}  {status}  {left} left")
        self._restart_timer()
        return status

    def _read_losses(self) -> dict[str, float]:
        row = self.losses.read(self.step)
        self.loss = row["loss"]
        return row

    def _restart_timer(self) -> None:
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        self.timer_step, self.timer_start = self.step, time.perf_counter()

    def _log(self, values: dict[str, float]) -> None:
        if self.is_main:
            epoch = round(self.step / self.steps_per_epoch, 4)
            self.folder.append_row({"step": self.step, "epoch": epoch, **values})
        self.accelerator.log(values, step=self.step)

    def _log_scores(self) -> None:
        """Evaluate what is due after this step, and log scores that are not in the log."""
        due = self.evaluation.due(self.step, self.total_steps, self.steps_per_epoch)
        if not due:
            return
        scores = self._evaluate(due)
        rows = self.folder.rows() if self.is_main else []
        logged = {key for row in rows if row["step"] == self.step for key in row}
        for score in scores:
            self.console.print(f"step {self.step}/{self.total_steps}  {score.summary()}")
            if not score.metrics.keys() <= logged:  # else a resumed run evaluates its last step
                self._log(score.metrics)
        self._restart_timer()

    def _evaluate(self, tasks: list[str]) -> list[TaskScores]:
        """Return scores on the main process, and an empty list on the others, which wait for it.

        `data.eval` of a task is scored by the selected weights, if there are any.
        """
        scores = []
        self._require_finite()
        with self.parallel.evaluation_model() as model, self.accelerator.autocast():
            for task in tasks if self.is_main else ():
                best = self._selected_model() if task == self.config.task else None
                scores.append(self._evaluate_one(task, best or model))
                if task == VALIDATION:
                    self.evaluation.select(model, self.tokenizer, self.step)
        self.barrier.wait()
        return scores

    def _evaluate_one(self, task: str, model: PretrainedModel) -> TaskScores:
        samples = len(self.evaluation.sources[task])
        self.console.print(f"evaluating {task} on {samples} samples")
        bar = self.bars.add_task("", total=samples, unit="sample")

        def show(unit: str, done: int, total: int) -> None:
            self.bars.update(bar, unit=unit, completed=done, total=total)

        try:
            return self.evaluation.run(task, model, self.tokenizer, show)
        finally:
            self.bars.remove_task(bar)

    def _save_checkpoint(self) -> None:
        if self.losses:
            self._read_losses()
        self._require_finite()
        folder = unfinished(self.folder.checkpoints.of(self.step))
        self.parallel.save(folder)
        self.batches.save(folder)
        self.barrier.wait()
        if self.is_main:
            keep = self.config.keep_checkpoints
            self.folder.checkpoints.commit(self.step, keep=keep, **self._invariants())
        self.barrier.wait()
        self._restart_timer()

    def _require_finite(self) -> None:
        """Raise TrainingError on every process if weights or buffers of one are not finite."""
        state = {n: t for n, t in self.model.state_dict().items() if t.is_floating_point()}
        parts = (t.to_local() if isinstance(t, DTensor) else t for t in state.values())
        is_bad = torch.stack([~part.isfinite().all() for part in parts])
        counts = self.accelerator.reduce(is_bad.float(), "sum").tolist()
        if bad := [name for name, count in zip(state, counts, strict=True) if count]:
            raise TrainingError(
                f"step {self.step}: {len(bad)} tensors of the model have NaN or infinity, the "
                f"first of them {bad[0]}: lower optim.lr, lengthen optim.warmup_steps, or set "
                "optim.max_grad_norm; --resume continues from the last checkpoint"
            )

    def _finish(self) -> TrainResult:
        self._log_scores()
        model = self.parallel.finish()
        if self.is_main:
            self.evaluation.save(model, self.tokenizer, self.folder.model)
            model = self._selected_model() or model
        self.barrier.wait()
        task, scores = self.config.task, self.evaluation.scores
        self.accelerator.end_training()
        return TrainResult(
            model=model,
            tokenizer=self.tokenizer,
            eval_source=self.evaluation.sources.get(task or "retrieval"),
            output_dir=self.folder.path,
            step=self.step,
            loss=self.loss,
            scores=None if task else scores.get("retrieval"),
            zero_shot=scores.get("zero_shot"),
            task_scores=scores.get(task) if task else None,
            selection=self.evaluation.selection,
            skipped=self.batches.summary(),
            is_main_process=self.is_main,
        )

    def _selected_model(self) -> PretrainedModel | None:
        return self.evaluation.selected_model(self.accelerator.device)

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps
