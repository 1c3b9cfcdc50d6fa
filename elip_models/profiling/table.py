"""The command `elip profile`: one table for all models and strategies.

Weights are random, since neither FLOPs nor times depend on them. A strategy that does not fit a
model, or cannot reach the requested FLOPs, is listed with the reason instead of a row.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from elip_models.profiling.component_profile import (
    ComponentCosts,
    components_table,
    profile_components,
)
from elip_models.profiling.measure import measured_on, memory_kind
from elip_models.profiling.runner import DENSE, MODES, ProfileRow, profile_model
from elip_models.profiling.workload import Workload
from elip_models.saving.files import write_json
from elip_models.saving.meta_build import quiet_logs
from elip_models.saving.open_model import FORMS, open_model
from elip_models.strategies import STRATEGIES
from elip_models.strategies.flops import check_share
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.spec import (
    check_keep,
    fit_strategy,
    get_strategy,
    option_types,
    parse_spec,
)
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.summary import runs
from elip_models.towers import as_reducible, as_tower
from elip_models.validation import ConfigError, as_config_error, check_output

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 180  # characters, if the output is not a terminal


@dataclass(frozen=True)
class ProfileSettings:
    """The options of `elip profile`, which raise ConfigError if they are invalid."""

    models: tuple[str, ...]  # specs as in `open_model`
    strategies: tuple[str, ...]  # specs as in `get_strategy`; none: all strategies
    schedule: str | None  # of strategies whose spec has none
    flops: float | None  # share of the dense tower's training FLOPs, set for every strategy
    keep: float | None  # mean share of tokens over the layers, set for every strategy
    batch_sizes: tuple[int, ...]
    mode: str  # 'training', 'inference' or 'both'
    dtype: str
    rounds: int | None  # None only counts, on the meta device
    parts: bool = False  # also profile by component

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.mode not in (*MODES, "both"):
            raise ConfigError(f"--mode: expected {', '.join(MODES)} or both, got {self.mode!r}")
        if self.flops is not None and not 0 < self.flops <= 1:
            raise ConfigError(f"--flops: expected a share of dense in (0, 1], got {self.flops}")
        with as_config_error("--keep", inner="keep"):
            check_share(self.keep)
        for name in ("flops", "schedule"):
            other = getattr(self, name)
            if other is not None and self.keep is not None:
                raise ConfigError(
                    f"--keep: expected it or --{name}, got {self.keep} with --{name} {other}"
                )
        with as_config_error("--schedule"):
            if self.schedule:
                Schedule.parse(self.schedule)
        with as_config_error("--strategy"):
            for text in self.compared:
                get_strategy(text)
                check_keep(text, {}, self.keep)
                check_keep(text, {}, self.flops, name="flops")
        if not self.models:
            raise ConfigError(f"--model: expected one or more, {FORMS}")

    @property
    def compared(self) -> dict[str, None]:
        """Return the specs of the strategies without duplicates, in order."""
        return dict.fromkeys(self.strategies or (*STRATEGIES, "elip:scorer=exact"))

    @property
    def device(self) -> torch.device:
        """Return the device of the steps, which is 'meta' if they are only counted."""
        if self.rounds is None:
            return torch.device("meta")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class LeftOut:
    """A strategy without rows for a model, and the reason."""

    model: str
    strategy: str
    reason: str

    def __str__(self) -> str:
        return f"{self.model}: {self.strategy} is left out: {self.reason}"


def open_for_profile(
    spec: str, settings: ProfileSettings
) -> tuple[nn.Module, dict[str, Strategy], list[LeftOut]]:
    """Open the model with random weights, on the meta device if nothing is timed.

    Returns:
        The model, the strategies that fit it, by spec, and the others with their reasons.
    """
    with as_config_error("--model", inner="spec"), settings.device, quiet_logs():
        model = open_model(spec, pretrained=False).to(DTYPES[settings.dtype])
        as_tower(as_reducible(model).image_model)
    workload, fitting, left_out = Workload(model, 1), {}, []
    for text in settings.compared:
        try:
            name, written = parse_spec(text)
            takes = "schedule" in option_types(name) and "schedule" not in written
            strategy = get_strategy(text, schedule=settings.schedule if takes else None)
            if settings.flops is not None:
                fitted = strategy.fitted(workload.tower)
                strategy = fitted.at_flops(workload.tower, settings.flops)
            else:
                strategy = fit_strategy(strategy, workload.tower, settings.keep)
            workload.forward(strategy)
        except (TypeError, ValueError) as error:
            left_out.append(LeftOut(spec, text, " ".join(str(error).split())))
        else:
            fitting[text] = strategy
    return model, fitting, left_out


def table_of(settings: ProfileSettings, rows: Sequence[ProfileRow]) -> Table:
    """Return a table with a section for each model, batch and mode."""
    steps = sorted({row.step for row in rows})
    title = f"FLOPs of one image or pair, {' or '.join(steps)}; ratios against dense"
    if settings.flops is not None:
        title += f"; towers at {settings.flops:g} of dense training FLOPs"
    names = ["kept", "forward\nGFLOPs", "backward\nGFLOPs", "FLOPs"]
    if settings.rounds is not None:
        title += f"; {measured_on(settings.device)['device']}, {settings.dtype}"
        title += f"; memory: {memory_kind(settings.device)}"
        names += ["ms", "time", "MB", "memory", ""]
    table = Table("strategy", "tokens per layer", title=title)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for key, section in groupby(rows, lambda row: (row.model, row.mode, row.batch_size)):
        model, mode, batch_size = key
        table.add_section()
        table.add_row(f"[bold]{escape(model)}[/]", f"{mode}, batch {batch_size}")
        for row in section:
            table.add_row(escape(row.strategy), runs(t.attention for t in row.tokens), *_cells(row))
    return table


def _cells(row: ProfileRow) -> list[str]:
    """Return the cells of a row from the column 'kept' on."""
    cells = [f"{row.retained:.3f}", f"{row.forward_flops / 1e9:.3f}"]
    cells += [f"{row.backward_flops / 1e9:.3f}" if row.mode == "training" else "-"]
    cells += [f"{row.flops_ratio:.3f}"]
    if row.seconds is not None and row.time_ratio is not None:
        digits = 0 if row.seconds >= 0.1 else 1 if row.seconds >= 0.01 else 2
        cells += [f"{1e3 * row.seconds:.{digits}f}", f"{row.time_ratio:.2f}"]
        known = row.memory is not None and row.memory_ratio is not None
        cells += [f"{row.memory / 1e6:.4g}", f"{row.memory_ratio:.2f}"] if known else ["-", "-"]
        cells += ["" if row.strategy == DENSE else row.verdict]
    return cells


def print_profile(settings: ProfileSettings, *, output: Path | None, console: Console) -> None:
    """Measure all rows, model by model, print them, and write `output` as JSON.

    An unknown model, or one that cannot be reduced, raises ConfigError.
    """
    check_output("--output", output)
    if not console.is_terminal:
        console = Console(width=WIDTH)
    rows: list[ProfileRow] = []
    left_out: list[LeftOut] = []
    parts: list[ComponentCosts] = []
    doing = "counting" if settings.rounds is None else "measuring, side by side:"
    with console.status("opening models") as status:
        for spec in settings.models:
            model, strategies, refused = open_for_profile(spec, settings)
            left_out += refused
            for batch_size in settings.batch_sizes:
                compared = f"dense and {len(strategies)} strategies"
                status.update(f"{doing} {spec}, batch {batch_size}, {compared}")
                rows += profile_model(
                    spec,
                    model,
                    strategies,
                    batch_size=batch_size,
                    modes=[mode for mode in MODES if settings.mode in (mode, "both")],
                    rounds=settings.rounds,
                )
                if settings.parts:
                    with as_config_error("--parts"):
                        workload, every = Workload(model, batch_size), {DENSE: None, **strategies}
                        parts += profile_components(spec, workload, every)
    console.print(table_of(settings, rows))
    for refusal in left_out:
        console.print(str(refusal), markup=False)
    if parts:
        console.print(components_table(parts))
    if output is not None:
        content = {
            **measured_on(settings.device),
            "dtype": settings.dtype,
            "rounds": settings.rounds,
            "weights": "random",
            "flops_are_of": "one image, or pair of a whole model",
            "memory_is": memory_kind(settings.device),
        }
        tables = {"rows": rows, "left_out": left_out, "parts": parts}
        plain = {name: [asdict(row) for row in table] for name, table in tables.items()}
        write_json(output, content | plain)
