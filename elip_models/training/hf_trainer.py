"""Token reduction in the Trainer of transformers, as a callback."""

from typing import Any

from torch import nn

from elip_models.reduction.patch import is_reduced, reduce_, reduction_summary, unreduce_
from elip_models.reduction.strategy import Strategy
from elip_models.validation import Count, PositiveShare, check, require_extra

with require_extra("elip_models.training"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ReductionCallback(TrainerCallback):
    """A callback that reduces the Trainer's model by `reduce_`, and can end training dense.

        Trainer(model, args, callbacks=[ReductionCallback("tome", until=0.9)], ..)

    The state depends only on the Trainer's step count, so that a resumed run continues identically.
    An evaluation runs with the reduction of the step before it. After training the model keeps the
    state of the last step. With the Trainer's `torch_compile`, the model is compiled again when the
    reduction changes.
    """

    def __init__(
        self,
        strategy: str | Strategy | None = None,
        *,
        until: Count | PositiveShare | None = None,
        **options: Any,
    ) -> None:
        """Store the reduction and the step at which it ends.

        Args:
            strategy: As in `reduce_`. A `PatchDropout(.., until=..)` is resolved for each step.
                None without options: the present reduction of the model, or the default one.
            until: The first dense step, counted in optimiser steps from 0. A float is a share of
                all steps of the run: with 0.9 the last tenth is dense. None: no step is dense.
            **options: As in `reduce_`.

        Raises:
            TypeError, ValueError: An invalid `until`. Invalid arguments of `reduce_` raise when
                training begins.
        """
        check("until", until, Count | PositiveShare | None)
        self.strategy = strategy
        self.until = until
        self.options = options

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **others: Any,
    ) -> None:
        """Reduce the model, or restore the dense one, as the coming optimiser step requires."""
        until = self.until
        if isinstance(until, float):
            until = round(until * state.max_steps)
        if until is not None and state.global_step >= until:
            unreduce_(model)
            return
        if self.strategy is None:
            self._resolve_strategy(model)
        strategy = self.strategy
        if isinstance(strategy, Strategy):
            strategy = strategy.for_step(state.global_step)
        reduce_(model, strategy=strategy, **self.options)

    def _resolve_strategy(self, model: nn.Module) -> None:
        """Choose the strategy once, before `unreduce_` removes that of a reduced model."""
        if self.options or not is_reduced(model):
            reduce_(model, **self.options)
        self.strategy, self.options = reduction_summary(model).strategy, {}

    on_train_begin = on_step_begin  # for an evaluation before the first step
