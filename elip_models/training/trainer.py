"""Training through `accelerate`: one process, or several under `torchrun`, by the same code.

A checkpoint lies between two optimiser steps. The order of the data is a function of (seed, epoch);
the position in it and the learning rate are functions of the step. So a run that was killed and
resumed computes what one that was never killed does; on a stream it goes on at a shard (`feed`).
"""

import math
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from elip_models.data import ExampleSource, Source, StreamSource
from elip_models.models.peft.adapt import trainable_counts
from elip_models.models.registry import family_of
from elip_models.profiling.measure import saved_bytes
from elip_models.tasks.registry import save_answers
from elip_models.training.accelerator import make_accelerator, waiting_group
from elip_models.training.errors import Stopped, TrainingError
from elip_models.training.evaluation import Evaluation, Scores
from elip_models.training.loss_log import LossLog, losses_of
from elip_models.training.model import make_model
from elip_models.training.optim import learning_rate
from elip_models.training.provenance import origin
from elip_models.training.replicated import Replicated
from elip_models.training.result import TrainResult
from elip_models.training.run_checkpoints import step_of
from elip_models.training.run_config import RunConfig
from elip_models.training.run_folder import RunFolder
from elip_models.training.sharded import Sharded, check_sharding
from elip_models.training.signal_handling import Stop
from elip_models.training.train_batches import make_feed
from elip_models.training.training_data import (
    check_guide_captions,
    make_tokenizer,
    model_config,
    open_training,
    task_of,
)
from elip_models.validation import as_config_error, require_extra

with require_extra("elip_models.training"):
    from accelerate.utils import broadcast_object_list, set_seed
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )


def train(
    config: RunConfig, *, resume: bool = False, console: Console | None = None
) -> TrainResult:
    """Trains as the recipe says and saves the model in `output_dir/model`.

    Args:
        config: the recipe.
        resume: continue from the newest checkpoint of `output_dir`, or start where there is none.
        console: where progress is shown; None shows nothing.

    Raises:
        TypeError: `config` is no RunConfig.
        ConfigError: a setting that does not fit the data, the model or the machine.
        TrainingError: `output_dir` holds a run already or is in use, another recipe is resumed, no
            checkpoint is whole, or the loss is not finite.
        Stopped: SIGTERM or SIGINT came; a checkpoint of the last step is there.
        DataError: the data cannot be read, or too much of it.
    """
    if not isinstance(config, RunConfig):
        raise TypeError(f"config: expected a RunConfig from load_recipe, got {config!r:.100}")
    with RunFolder(config.output_dir).held(config, resume=resume):
        return Trainer(config, resume=resume, console=console or Console(quiet=True)).run()


class Trainer:
    """One run: opens the data, builds the model, restores a checkpoint, trains, saves.

    Of the model it asks what `PretrainedModel` has.
    """

    def __init__(self, config: RunConfig, *, resume: bool, console: Console) -> None:
        self.config = config
        self.folder = RunFolder(config.output_dir)
        self.accelerator = make_accelerator(config, self.folder)
        self.waiting = waiting_group(self.accelerator)
        if config.optim.shard:
            check_sharding(config, self.accelerator.num_processes)
        self.console = console if self.accelerator.is_main_process else Console(quiet=True)
        self.losses = LossLog(self.accelerator, most=config.optim.max_nonfinite_steps)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.prepare()
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoint() if resume else None
        self._build_data()
        self._build_model(resumed=checkpoint is not None)
        if self.accelerator.is_main_process:
            self.folder.claim(config, origin(self.source, checkpoint))
        self._restore(checkpoint)

    def run(self) -> TrainResult:
        """Trains to the last step, then saves the model."""
        self.model.train()
        self._start_window()
        with Stop() as stop, self._progress() as progress:
            task = progress.add_task("", total=self.total_steps, completed=self.step, status="")
            while self.step < self.total_steps:
                self._train_step()
                progress.update(task, completed=self.step)
                if self._due(self.config.log_every):
                    progress.update(task, status=self._log_step())
                is_last = self.step == self.total_steps
                if is_last:  # what follows may fail
                    self._save_checkpoint()
                if due := self.evaluation.due(self.step, self.total_steps):
                    self._log_scores(due)
                is_stopped = stop.came(self.accelerator, may_wait=self._due(self.config.log_every))
                if not is_last and (self._due(self.config.checkpoint_every) or is_stopped):
                    self._save_checkpoint()
                if not is_last and is_stopped:
                    raise self._stopped(stop.signal)
        return self._finish()

    def _stopped(self, number: int) -> Stopped:
        """Why the run ends here."""
        return Stopped(
            f"{self.folder.path}: {signal.Signals(number).name} ended the run after step "
            f"{self.step} of {self.total_steps}, whose checkpoint is there: continue it with "
            "--resume",
            number,
        )

    def _checkpoint(self) -> Path | None:
        """The newest whole checkpoint, as the first process finds it; None where there is none."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = self.folder.checkpoints.latest(self._tell)
            except TrainingError as error:
                found[1] = str(error)
        checkpoint, problem = broadcast_object_list(found)
        if problem is not None:
            raise TrainingError(problem)
        return checkpoint

    def _tell(self, line: str) -> None:
        self.console.print(f"[bold yellow]warning:[/] {escape(line)}", soft_wrap=True)

    def _build_data(self) -> None:
        """Sources, tokenizer and feed, and how many steps they make."""
        data, optim, accelerator = self.config.data, self.config.optim, self.accelerator
        model = model_config(self.config)
        family, task = family_of(self.config.model.name, self.config.task), task_of(self.config)
        with as_config_error("data.train"):
            source: Source | ExampleSource | StreamSource
            source = self.source = open_training(self.config, model.image_size)
        with as_config_error("model.overrides.guide"):
            check_guide_captions(model, source)
        self.evaluation = Evaluation(self.config, model.image_size)
        self.tokenizer = make_tokenizer(self.config, source, model, self.folder, accelerator)
        with as_config_error("data.tokenizer"):
            self.text_sizes = family.fit_tokenizer(self.tokenizer, data.context_length)
        if task is not None:
            self.text_sizes |= task.fields(source, model)
            self.evaluation.answers = getattr(source, "answers", None)
        self.feed = make_feed(self.config, model, source, self.tokenizer, accelerator)
        self.batches_per_epoch = self.feed.batches_per_epoch
        passes = (optim.epochs or 0) * self.batches_per_epoch
        self.total_steps = optim.steps or math.ceil(passes / optim.grad_accumulation)
        self.steps_per_epoch = self.batches_per_epoch / optim.grad_accumulation
        self.learning_rate = partial(
            learning_rate,
            lr=optim.lr,
            warmup_steps=optim.warmup_steps,
            warmup_lr=optim.warmup_lr,
            total_steps=self.total_steps,
            decay=optim.decay,
            decay_each=optim.decay_each,
            min_lr=optim.min_lr,
            decay_rate=optim.decay_rate,
            steps_per_epoch=self.steps_per_epoch,
        )

    def _build_model(self, *, resumed: bool) -> None:
        """Model and optimiser; the same weights on every rank, other dropout."""
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
        place = Sharded if optim.shard else Replicated
        self.parallel = place(self.accelerator, model, optim)
        self.model = self.parallel.model
        trained, every = trainable_counts(self.model)
        self.what_trains = {"trainable": trained, "trainable_share": round(trained / every, 6)}
        set_seed(seed, device_specific=True)

    def _restore(self, checkpoint: Path | None) -> None:
        """Puts model, optimiser, random generators, data and log where `checkpoint` left them."""
        self.first_step = 0
        if checkpoint is not None:
            self.first_step = step_of(checkpoint, **self._invariants())
        self.step = self.first_step
        batches_done = self.step * self.config.optim.grad_accumulation
        self.feed.start(batches_done, checkpoint)
        if checkpoint is not None:
            self.parallel.load(checkpoint)
        if self.accelerator.is_main_process:
            self.folder.truncate_rows(self.step)
        losses = [row["loss"] for row in self.folder.rows() if "loss" in row]
        self.loss = losses[-1] if losses else math.nan
        purge = {"tensorboard": {"purge_step": self.step + 1}}
        self.accelerator.init_trackers(self.config.name, init_kwargs=purge)

    def _invariants(self) -> dict[str, int | list[int]]:
        """What a resumed run shares with the one that was saved, besides the recipe."""
        return {"num_processes": self.accelerator.num_processes, **self.feed.invariants()}

    def _train_step(self) -> None:
        """One optimiser step over `grad_accumulation` batches."""
        self.model.begin_step(self.step, self.step / self.steps_per_epoch)
        optim, accelerator = self.config.optim, self.accelerator
        for group in self.parallel.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step) * group["lr_scale"]
        losses = []
        for _ in range(optim.grad_accumulation):
            tensors = self.feed.next_batch()
            tensors = {n: t.to(accelerator.device, non_blocking=True) for n, t in tensors.items()}
            with self.parallel.accumulate():
                output = self._forward(tensors)
                accelerator.backward(output.loss)
            losses.append(losses_of(output))
        self.losses.add(losses, self.parallel.step_(optim.max_grad_norm))
        self.step += 1

    def _forward(self, tensors: dict[str, Tensor]) -> Any:
        """The model's output; of the first forward, what it saves for backward is counted, where
        one process runs it as it is written.
        """
        is_counted = self.accelerator.num_processes == 1 and not self.config.optim.compile
        if self.step > self.first_step or not is_counted:
            return self.parallel.forward(**tensors)
        with saved_bytes(self.model.parameters()) as count:
            output = self.parallel.forward(**tensors)
        self.what_trains["saved_bytes"] = count()
        return output

    def _log_step(self) -> str:
        """Logs the last step; returns it in words."""
        read = self._read_losses()
        optim, first_step, start = self.config.optim, *self.window
        images = (self.step - first_step) * optim.grad_accumulation * optim.batch_size
        speed = images * self.accelerator.num_processes / (time.perf_counter() - start)
        monitored = {name: value.item() for name, value in self.model.monitored().items()}
        lr = self.learning_rate(self.step - 1)
        own = {"images_per_second": round(speed, 2), **self.what_trains}
        self.what_trains = {}  # said once
        self._log({**read, "lr": lr, **own, **monitored})
        self._start_window()
        parts = (f"{n[5:]} {v:.3f}" for n, v in read.items() if n.startswith("loss_"))
        status = "  ".join([f"loss {self.loss:.3f}", *parts, f"{speed:.0f} images/s"])
        if not self.console.is_terminal:
            self.console.print(f"step {self.step}/{self.total_steps}  {status}")
        return status

    def _read_losses(self) -> dict[str, float]:
        read = self.losses.read(self.step)
        self.loss = read["loss"]
        return read

    def _log_scores(self, tasks: Sequence[str]) -> None:
        for scores in self._evaluate(tasks):
            self._log(scores.metrics)
            self.console.print(f"step {self.step}/{self.total_steps}  {scores.summary()}")
        self._start_window()

    def _log(self, values: dict[str, float]) -> None:
        """Adds a row to the log and to the trackers."""
        if self.accelerator.is_main_process:
            epoch = self.step * self.config.optim.grad_accumulation / self.batches_per_epoch
            self.folder.append_row({"step": self.step, "epoch": round(epoch, 4), **values})
        self.accelerator.log(values, step=self.step)

    def _evaluate(self, tasks: Sequence[str]) -> list[Scores]:
        """Scores of the main process, while the others wait; none on those."""
        found = []
        with self.parallel.evaluated() as model, self.accelerator.autocast():
            if self.accelerator.is_main_process:
                found = [self.evaluation.run(task, model, self.tokenizer) for task in tasks]
        if self.waiting is not None:
            dist.barrier(self.waiting)
        return found

    def _evaluate_again(self) -> None:
        """What the last step evaluated, or failed to: then it is logged now."""
        logged = {key for row in self.folder.rows() if row["step"] == self.step for key in row}
        for scores in self._evaluate(self.evaluation.due(self.total_steps, self.total_steps)):
            if not scores.metrics.keys() <= logged:
                self._log(scores.metrics)

    def _save_checkpoint(self) -> None:
        if self.losses:
            self._read_losses()
        unfinished = self.folder.checkpoints.unfinished(self.step)
        self.parallel.save(unfinished)
        self.feed.save(unfinished)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.checkpoints.commit(
                self.step, keep=self.config.keep_checkpoints, **self._invariants()
            )
        self._start_window()

    def _finish(self) -> TrainResult:
        if self.first_step >= self.total_steps:  # resumed after its last step, not evaluated yet
            self._evaluate_again()
        model = self.parallel.finish()
        if self.accelerator.is_main_process:
            model.save_pretrained(self.folder.model, tokenizer=self.tokenizer)
            if self.evaluation.answers is not None:
                save_answers(self.folder.model, self.evaluation.answers)
        self.accelerator.end_training()
        task, scores = self.config.task, self.evaluation.scores
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
            skipped=self.feed.summary(),
            is_main_process=self.accelerator.is_main_process,
        )

    def _due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def _start_window(self) -> None:
        """Begins the steps over which the speed is measured."""
        self.window = (self.step, time.perf_counter())

    def _progress(self) -> Progress:
        status = TextColumn("{task.fields[status]}")
        columns = (MofNCompleteColumn(), BarColumn(), status, TimeRemainingColumn())
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)
