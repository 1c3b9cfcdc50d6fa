"""Training with `accelerate`, with the same code for one process and for several under `torchrun`.

A checkpoint is written between two optimiser steps. The order of the data is a function of seed and
epoch. The position in it and the learning rate are functions of the step. So a run that was killed
and resumed computes the same as one that was not. A stream continues at the start of a shard
(`train_batches`).
"""

import math
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from elip_models.integrations.peft.adapt import trainable_counts
from elip_models.pretraining.data import ExampleSource, Source, StreamSource
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.registry import family_of
from elip_models.pretraining.training.accelerator import make_accelerator, make_barrier_group
from elip_models.pretraining.training.errors import as_write_error
from elip_models.pretraining.training.evaluation import VALIDATION, Evaluation, Scores
from elip_models.pretraining.training.loss_log import LossLog, losses_of
from elip_models.pretraining.training.model import make_model
from elip_models.pretraining.training.optim import learning_rate
from elip_models.pretraining.training.progress import (
    WARMUP_STEPS,
    StepTimer,
    evaluation_bars,
    progress_bar,
)
from elip_models.pretraining.training.provenance import run_provenance
from elip_models.pretraining.training.replicated import ReplicatedModel
from elip_models.pretraining.training.restore import restore_
from elip_models.pretraining.training.result import TrainResult
from elip_models.pretraining.training.run_checkpoints import step_of
from elip_models.pretraining.training.run_config import RunConfig
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.pretraining.training.selection import BestWeights
from elip_models.pretraining.training.sharded import ShardedModel, check_sharding
from elip_models.pretraining.training.signal_handling import StopSignal
from elip_models.pretraining.training.summary import print_plan
from elip_models.pretraining.training.train_batches import make_train_batches
from elip_models.pretraining.training.training_data import (
    check_guide_captions,
    make_tokenizer,
    meta_model,
    open_training_data,
    task_of,
)
from elip_models.profiling.measure import saved_bytes
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
            all checkpoints are damaged, or the loss is not finite.
        Stopped: SIGTERM or SIGINT was received, and a checkpoint of the last step was written.
        DataError: The data cannot be read, or too many samples cannot.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(f"config: expected a RunConfig from load_recipe, got {config!r:.100}")
    folder, console = RunFolder(config.output_dir), console or Console(quiet=True)
    with folder.locked(config, resume=resume), as_write_error(folder.path):
        return Trainer(config, resume=resume, console=console, folder=folder).run()


class Trainer:
    """One training run, with the arguments of `train`. `run` calls `prepare`, trains and saves.

    It uses only the interface of `PretrainedModel`. `folder` is that of the run, if it is locked.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool,
        console: Console,
        folder: RunFolder | None = None,
    ) -> None:
        self.config = config
        self.resume = resume
        self.console = console
        self.folder = folder or RunFolder(config.output_dir)

    def run(self) -> TrainResult:
        """Prepare the run, train to the last step, save the model and return the result."""
        self.prepare()
        with self.parallel.expected_warnings_ignored(), progress_bar(self.console) as self.bars:
            self._train()
            return self._finish()

    def prepare(self) -> None:
        """Open data, build the model, restore the checkpoint and write the recipe to the folder."""
        self.accelerator = make_accelerator(self.config, self.folder)
        self.barrier_group = make_barrier_group(self.accelerator)
        if self.config.optim.shard:
            check_sharding(self.config, self.accelerator.num_processes)
        if not self.accelerator.is_main_process:
            self.console = Console(quiet=True)
        max_nonfinite = self.config.optim.max_nonfinite_steps
        self.losses = LossLog(self.accelerator, max_nonfinite=max_nonfinite)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.prepare()
            self._announce()
        self.accelerator.wait_for_everyone()
        checkpoint = self._find_checkpoint() if self.resume else None
        self._build_data()
        self._build_model(resumed=checkpoint is not None)
        self.accelerator.wait_for_everyone()  # each has loaded the tokenizer
        if self.accelerator.is_main_process:
            self.folder.record_start(self.config, run_provenance(self.source, checkpoint))
        self._restore(checkpoint)

    def _train(self) -> None:
        self.model.train()
        self._restart_timer()
        counts = {"total": self.total_steps, "completed": self.step}
        task = self.bars.add_task("", start=False, **counts, unit="step")
        with StopSignal() as stop:
            while self.step < self.total_steps:
                if self.step - self.first_step == WARMUP_STEPS:
                    self._restart_timer()
                    self.bars.reset(task, completed=self.step)  # starts the estimate of the bar
                self._train_step()
                self.bars.update(task, completed=self.step)
                if self._due(self.config.log_every):
                    self.bars.update(task, description=self._log_step())
                is_last = self.step == self.total_steps
                if is_last:
                    self._save_checkpoint()  # before an evaluation that may fail
                if due := self.evaluation.due(self.step, self.total_steps, self.steps_per_epoch):
                    self._log_scores(due)
                is_stopped = stop.received(
                    self.accelerator, may_wait=self._due(self.config.log_every)
                )
                if not is_last and (self._due(self.config.checkpoint_every) or is_stopped):
                    self._save_checkpoint()
                if not is_last and is_stopped:
                    raise Stopped(
                        f"{self.folder.path}: {signal.Signals(stop.signal).name} ended the run "
                        f"after step {self.step} of {self.total_steps}, with a checkpoint: "
                        "continue it with --resume",
                        stop.signal,
                    )

    def _announce(self) -> None:
        accelerator = self.accelerator
        device, count = accelerator.device.type, accelerator.num_processes
        print_plan(self.config, self.console, device=device, num_processes=count)

    def _find_checkpoint(self) -> Path | None:
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = self.folder.checkpoints.latest(self._warn)
            except TrainingError as error:
                found[1] = str(error)
        checkpoint, problem = broadcast_object_list(found)
        if problem is not None:
            raise TrainingError(problem)
        return checkpoint

    def _warn(self, line: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {escape(line)}", soft_wrap=True)

    def _build_data(self) -> None:
        data, optim, accelerator = self.config.data, self.config.optim, self.accelerator
        model = meta_model(self.config).config
        family, task = family_of(self.config.model.name, self.config.task), task_of(self.config)
        with as_config_error("data.train", inner="spec"):
            source: Source | ExampleSource | StreamSource
            source = self.source = open_training_data(self.config, model.image_size)
        with as_config_error("model.overrides.guide"):
            check_guide_captions(model, source)
        self.evaluation = Evaluation(self.config, model.image_size)
        self.best = BestWeights(self.config, task, self.folder)
        self.tokenizer = make_tokenizer(
            self.config, source, model, self.folder, accelerator, self.console
        )
        with as_config_error("data.tokenizer"):
            self.text_sizes = family.fit_tokenizer(self.tokenizer, data.context_length)
        if task is not None:
            self.text_sizes |= task.fields(source, model)
            self.evaluation.answers = getattr(source, "answers", None)
        self.batches = make_train_batches(self.config, model, source, self.tokenizer, accelerator)
        self.batches_per_epoch = self.batches.batches_per_epoch
        passes = (optim.epochs or 0) * self.batches_per_epoch
        self.total_steps = optim.steps or math.ceil(passes / optim.grad_accumulation)
        self.steps_per_epoch = self.batches_per_epoch / optim.grad_accumulation
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
        parallel_class = ShardedModel if optim.shard else ReplicatedModel
        self.parallel = parallel_class(self.accelerator, model, optim)
        self.model = self.parallel.model
        trained, every = trainable_counts(self.model)
        self.first_row = {"trainable": trained, "trainable_share": round(trained / every, 6)}
        set_seed(seed, device_specific=True)

    def _restore(self, checkpoint: Path | None) -> None:
        self.first_step = 0
        if checkpoint is not None:
            self.first_step = step_of(checkpoint, **self._invariants())
        self.step = self.first_step
        batches_done = self.step * self.config.optim.grad_accumulation
        self.batches.start(batches_done, checkpoint)
        if checkpoint is not None:
            restore_(self.parallel, checkpoint)
        if self.accelerator.is_main_process:
            self.folder.truncate_rows(self.step, self._warn)
        losses = [row["loss"] for row in self.folder.rows() if "loss" in row]
        self.loss = losses[-1] if losses else math.nan
        purge = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers(self.config.name, init_kwargs=purge)

    def _invariants(self) -> dict[str, int | list[int]]:
        return {"num_processes": self.accelerator.num_processes, **self.batches.invariants()}

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
        read = self._read_losses()
        optim = self.config.optim
        images = optim.grad_accumulation * optim.batch_size * self.accelerator.num_processes
        speed = images / self.timer.seconds(self.step)
        left = self.timer.left(self.step, self.total_steps)
        monitored = {name: value.item() for name, value in self.model.monitored().items()}
        lr = self.learning_rate(self.step - 1)
        own = {"images_per_second": round(speed, 2), **self.first_row}
        self.first_row = {}
        self._log({**read, "lr": lr, **own, **monitored})
        self._restart_timer()
        parts = (f"{n[5:]} {v:.3f}" for n, v in read.items() if n.startswith("loss_"))
        status = "  ".join([f"loss {self.loss:.3f}", *parts, f"{speed:.0f} images/s"])
        if not self.console.is_terminal:
            self.console.print(f"step {self.step}/{self.total_steps}  {status}  {left} left")
        return status

    def _read_losses(self) -> dict[str, float]:
        read = self.losses.read(self.step)
        self.loss = read["loss"]
        return read

    def _log_scores(self, tasks: Sequence[str]) -> None:
        for scores in self._evaluate(tasks):
            self._log(scores.metrics)
            self.console.print(f"step {self.step}/{self.total_steps}  {scores.summary()}")
        self._restart_timer()

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            epoch = self.step * self.config.optim.grad_accumulation / self.batches_per_epoch
            self.folder.append_row({"step": self.step, "epoch": round(epoch, 4), **values})
        self.accelerator.log(values, step=self.step)

    def _evaluate(self, tasks: Sequence[str]) -> list[Scores]:
        """Return scores on the main process, and an empty list on the others, which wait for it."""
        found = []
        with self.parallel.evaluation_model() as model, self.accelerator.autocast():
            if self.accelerator.is_main_process:
                for task in tasks:
                    found.append(self._evaluate_one(task, model))
                    if task == VALIDATION:
                        save = partial(self.evaluation.save, model, self.tokenizer)
                        self.best.update(found[-1], self.step, save)
        self._wait_for_main()
        return found

    def _evaluate_one(self, task: str, model: PretrainedModel) -> Scores:
        samples = len(self.evaluation.sources[task])
        self.console.print(f"evaluating {task} on {samples} samples")
        with evaluation_bars(self.bars) as progress:
            return self.evaluation.run(task, model, self.tokenizer, progress)

    def _wait_for_main(self) -> None:
        if self.barrier_group is not None:
            dist.barrier(self.barrier_group)

    def _selected(self, last: PretrainedModel) -> PretrainedModel:
        """Return the selected weights on the main process, scored on `data.eval`, or the last."""
        best = None
        if self.accelerator.is_main_process:
            best = self.best.load(self.total_steps, self.accelerator.device)
        if best is not None and self.config.task in self.evaluation.sources:
            with self.accelerator.autocast():
                self._evaluate_one(self.config.task, best)
        self._wait_for_main()
        return last if best is None else best

    def _evaluate_again(self) -> None:
        """Evaluate the last step of a resumed run, and log scores that are not in the log."""
        logged = {key for row in self.folder.rows() if row["step"] == self.step for key in row}
        for scores in self._evaluate(self.evaluation.due(self.total_steps, self.total_steps)):
            if not scores.metrics.keys() <= logged:
                self._log(scores.metrics)

    def _save_checkpoint(self) -> None:
        if self.losses:
            self._read_losses()
        unfinished = self.folder.checkpoints.unfinished(self.step)
        self.parallel.save(unfinished)
        self.batches.save(unfinished)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.check_lock()
            self.folder.checkpoints.commit(
                self.step, keep=self.config.keep_checkpoints, **self._invariants()
            )
        self._restart_timer()

    def _finish(self) -> TrainResult:
        if self.first_step >= self.total_steps:  # resumed after its last step
            self._evaluate_again()
        model = self.parallel.finish()
        if self.accelerator.is_main_process:
            self.folder.check_lock()
            self.evaluation.save(model, self.tokenizer, self.folder.model)
        task, scores = self.config.task, self.evaluation.scores
        last_scores = scores.get(task) if task else None
        model = self._selected(model)
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
            selection=self.best.selection,
            last_scores=last_scores,
            skipped=self.batches.summary(),
            is_main_process=self.accelerator.is_main_process,
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def _restart_timer(self) -> None:
        self.timer = StepTimer(self.step, self.accelerator.device)
