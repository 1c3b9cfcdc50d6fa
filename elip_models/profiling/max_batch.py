"""The largest training batch for a given memory, dense and reduced (the paper's Table 9).

    bytes(B) = model_state + fixed + B * per_image;    the largest B with bytes(B) <= memory

model_state: weights, and for trainable ones a gradient and AdamW's two moments, in their dtype.
fixed, per_image: a line through the memory of a step at two small batches. On a GPU that is the
peak. Elsewhere it is what autograd saves for backward, without temporary memory.
"""

import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from elip_models.profiling.measure import memory_kind, memory_of
from elip_models.profiling.table import ProfileSettings, open_for_profile
from elip_models.profiling.workload import Workload
from elip_models.saving.files import write_json
from elip_models.strategies.strategy import Strategy
from elip_models.validation import ConfigError, check_output, shortened

BATCHES = (2, 4)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MOMENTS = 2  # AdamW's state of a parameter


@dataclass(frozen=True)
class MaxBatch:
    """Memory of a training step with a strategy, in bytes, and the largest batch."""

    model: str
    strategy: str
    model_state: int
    fixed: int
    per_image: int
    batch: int  # 0 if the weights do not fit
    ratio: float  # to the batch of the dense model


def bytes_of(memory: str) -> int:
    """Convert a size such as "16GB" or "16G" to bytes, by powers of 1,024."""
    match = re.fullmatch(
        r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([KMGT]?)(?:i?B)?\s*", memory, re.IGNORECASE
    )
    if match is None:
        raise ConfigError(f"--memory: expected a size such as 16GB, got {shortened(memory)}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def largest_batches(
    name: str, model: nn.Module, strategies: dict[str, Strategy | None], memory: int
) -> list[MaxBatch]:
    """Return a row for the dense model, then one for each strategy, for `memory` bytes."""
    model.train()
    model_state = sum(
        parameter.nbytes * (2 + MOMENTS if parameter.requires_grad else 1)
        for parameter in model.parameters()
    )
    rows: list[MaxBatch] = []
    for row, strategy in ({"dense": None} | strategies).items():
        fixed, per_image = _fit_line(model, strategy)
        batch = max(0, (memory - model_state - fixed) // per_image)
        ratio = batch / rows[0].batch if rows and rows[0].batch else 1.0
        rows.append(MaxBatch(name, row, model_state, fixed, per_image, batch, round(ratio, 3)))
    return rows


def _fit_line(model: nn.Module, strategy: Strategy | None) -> tuple[int, int]:
    """Return the bytes of a step without images, and those for each image."""
    memory = []
    for batch in BATCHES:
        workload = Workload(model, batch)
        forward = workload.forward(strategy)
        step, parameters = partial(workload.train_step, forward), list(model.parameters())
        memory.append(memory_of(step, workload.device, forward=forward, parameters=parameters))
    per_image = max(1, round((memory[1] - memory[0]) / (BATCHES[1] - BATCHES[0])))
    return max(0, memory[0] - BATCHES[0] * per_image), per_image


def print_largest_batches(
    settings: ProfileSettings, memory: str, *, output: Path | None, console: Console
) -> None:
    """Measure, print, and write `output` as JSON. Invalid settings raise ConfigError."""
    size = bytes_of(memory)
    check_output("--output", output)
    if settings.rounds is None:
        raise ConfigError("--flops-only: expected it without --max-batch, which measures memory")
    rows: list[MaxBatch] = []
    for name in settings.models:
        with console.status(f"measuring {name}"):
            model, strategies, left_out = open_for_profile(name, settings)
            rows += largest_batches(name, model, strategies, size)
        for refusal in left_out:
            console.print(str(refusal), markup=False)
    measured = memory_kind(next(model.parameters()).device)
    title, caption = f"largest training batch in {memory}", f"by the {measured}"
    table = Table("model", "strategy", title=title, caption=caption)
    for column in ("MiB of model", "MiB per step", "MiB per image", "batch", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = (f"{size / 2**20:.1f}" for size in (row.model_state, row.fixed, row.per_image))
        table.add_row(row.model, row.strategy, *sizes, str(row.batch), f"{row.ratio:.2f}")
    console.print(table)
    if output is not None:
        document = {"memory": size, "measured": measured, "rows": [asdict(row) for row in rows]}
        write_json(output, document)
