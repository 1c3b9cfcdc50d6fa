"""What `elip profile` does: models by their specs, strategies by theirs, one table of all rows.

Weights are random, since neither FLOPs nor times depend on them. Each model has the strategies that
fit it; those that do not, or that cannot reach the FLOPs asked for, are left out with the reason.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from elip_models.models.io.open_model import FORMS, open_model
from elip_models.profiling.component_profile import Parts, parts_table, profile_parts
from elip_models.profiling.measure import measured_on, memory_is
from elip_models.profiling.runner import DENSE, MODES, Mode, ProfileRow, profile_model
from elip_models.profiling.workload import Workload
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import STRATEGIES
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.strategy_spec import get_strategy, kinds_of, parse_spec
from elip_models.reduction.summary import runs
from elip_models.towers import as_reducible, as_tower
from elip_models.validation import ConfigError, as_config_error, check_output, from_checkout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 180  # of what is not printed on a terminal


@dataclass(frozen=True)
class ProfileSettings:
    """The options of `elip profile`.

    models: specs of `open_model`. strategies: lines of text, see `get_strategy`.
    schedule: of the strategies that take one and do not say theirs; None is ELIP's.
    flops: share of the dense tower's training FLOPs that every strategy is set to, if any.
    keep: or share of its tokens.
    rounds: of the timing; None counts alone, without memory for weights.
    parts: also by part of a model of ours, see `profile_parts`.
    """

    models: tuple[str, ...]
    strategies: tuple[str, ...]
    schedule: str | None = None
    flops: float | None = None
    keep: float | None = None
    batch_sizes: tuple[int, ...] = (8,)
    modes: tuple[Mode, ...] = MODES
    dtype: str = "fp32"
    rounds: int | None = 10
    parts: bool = False

    @property
    def device(self) -> torch.device:
        """Where steps run; what is only counted, on the meta device."""
        if self.rounds is None:
            return torch.device("meta")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class LeftOut:
    """A strategy that has no rows for a model, and why."""

    model: str
    strategy: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """All rows of the table, those by part, and the options that they were measured by."""

    settings: ProfileSettings
    rows: tuple[ProfileRow, ...]
    left_out: tuple[LeftOut, ...]
    parts: tuple[Parts, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The table as plain data, with where it was measured."""
        return {
            **measured_on(self.settings.device),
            "dtype": self.settings.dtype,
            "rounds": self.settings.rounds,
            "weights": "random",
            "flops_are_of": "one image, or pair of a whole model",
            "memory_is": memory_is(self.settings.device),
            "rows": [asdict(row) for row in self.rows],
            "left_out": [asdict(each) for each in self.left_out],
            "parts": [asdict(each) for each in self.parts],
        }


def run_profile(settings: ProfileSettings, say: Callable[[str], None] | None = None) -> Profile:
    """Measure all rows, model by model; `say` is told what comes next.

    Raises:
        ConfigError: a spec that names no model, or a model that cannot be reduced.
    """
    rows: list[ProfileRow] = []
    left_out: list[LeftOut] = []
    parts: list[Parts] = []
    for spec in settings.models:
        model = opened(spec, settings)
        strategies, refused = fitting(spec, model, settings)
        left_out += refused
        for batch_size in settings.batch_sizes:
            if say is not None:
                doing = "counting" if settings.rounds is None else "measuring, side by side:"
                say(f"{doing} {spec}, batch {batch_size}, dense and {len(strategies)} strategies")
            rows += profile_model(
                spec,
                model,
                strategies,
                batch_size=batch_size,
                modes=settings.modes,
                rounds=settings.rounds,
            )
            if settings.parts:
                with as_config_error("--parts"):
                    workload, every = Workload(model, batch_size), {DENSE: None, **strategies}
                    parts += profile_parts(spec, workload, every, rounds=settings.rounds)
    return Profile(settings, tuple(rows), tuple(left_out), tuple(parts))


def opened(spec: str, settings: ProfileSettings) -> nn.Module:
    """Open the model with random weights, on the meta device where nothing is timed."""
    with as_config_error("--model"), settings.device, _quietly():
        model = open_model(spec, pretrained=False).to(DTYPES[settings.dtype])
        as_tower(as_reducible(model).image_model)
    return model


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the libraries, which warn of random weights: here they are meant."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def fitting(
    name: str, model: nn.Module, settings: ProfileSettings
) -> tuple[dict[str, Strategy], list[LeftOut]]:
    """Try the strategies on the model -> those that fit, by the name of their rows, and the
    others.
    """
    workload, found, left_out = Workload(model, 1), {}, []
    for text in settings.strategies:
        try:
            strategy = _strategy_of(text, settings.schedule).fitted(workload.tower)
            if settings.flops is not None:
                strategy = strategy.at_flops(workload.tower, settings.flops)
            if settings.keep is not None:
                strategy = strategy.at_keep(workload.tower, settings.keep)
            workload.forward(strategy)
        except (TypeError, ValueError) as error:
            left_out.append(LeftOut(name, text, " ".join(str(error).split())))
        else:
            found[text] = strategy
    return found, left_out


def _strategy_of(text: str, schedule: str | None) -> Strategy:
    """The strategy of that line, by `schedule` where it takes one and the line has none."""
    name, written = parse_spec(text)
    takes = "schedule" in kinds_of(name) and "schedule" not in written
    return get_strategy(text, schedule=schedule if takes else None)


def table_of(profile: Profile) -> Table:
    """Lay the rows out in sections of one model, batch and mode."""
    rows, timed = profile.rows, profile.settings.rounds is not None
    table = Table(title=_title(profile))
    table.add_column("strategy")
    table.add_column("tokens a layer")
    names = ["kept", "forward\nGFLOPs", "backward\nGFLOPs", "FLOPs"]
    names += ["ms", "time", "MB", "memory"] if timed else []
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    if timed:
        table.add_column("")
    for _, section in groupby(rows, lambda row: (row.model, row.batch_size, row.mode)):
        section = list(section)
        table.add_section()
        head = section[0]
        table.add_row(f"[bold]{escape(head.model)}[/]", f"{head.mode}, batch {head.batch_size}")
        for row in section:
            table.add_row(escape(row.strategy), runs(t.attention for t in row.tokens), *_cells(row))
    return table


def _title(profile: Profile) -> str:
    steps = sorted({row.step for row in profile.rows})
    title = f"FLOPs of one image or pair, {' or '.join(steps)}; ratios against dense"
    if profile.settings.flops is not None:
        title += f"; towers at {profile.settings.flops:g} of dense training FLOPs"
    if profile.settings.rounds is not None:
        device = profile.settings.device
        title += f"; {measured_on(device)['device']}, {profile.settings.dtype}"
        title += f"; memory: {memory_is(device)}"
    return title


def _cells(row: ProfileRow) -> list[str]:
    """The cells of a row from the column 'kept' on."""
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


def profile_settings(
    *,
    models: Sequence[str],
    strategies: Sequence[str],
    schedule: str | None,
    flops: float | None,
    keep: float | None,
    batch_sizes: Sequence[int],
    mode: str,
    dtype: str,
    rounds: int | None,
    parts: bool = False,
) -> ProfileSettings:
    """Check the options of the command line; without strategies, all of them are measured.

    Raises:
        ConfigError: an option with another value than it takes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if mode not in (*MODES, "both"):
        raise ConfigError(f"--mode: expected {', '.join(MODES)} or both, got {mode!r}")
    if flops is not None and not 0 < flops <= 1:
        raise ConfigError(f"--flops: expected a share of dense in (0, 1], got {flops}")
    if keep is not None and not 0 < keep <= 1:
        raise ConfigError(f"--keep: expected a share of dense in (0, 1], got {keep}")
    if flops is not None and keep is not None:
        raise ConfigError(f"--keep: expected it or --flops, got {keep} beside --flops {flops}")
    with as_config_error("--schedule"):
        _ = schedule and Schedule.parse(schedule)
    with as_config_error("--strategy"):
        specs = tuple(dict.fromkeys(strategies or (*STRATEGIES, "elip:scorer=exact")))
        for text in specs:
            get_strategy(text)
    return ProfileSettings(
        models=tuple(dict.fromkeys(models)),
        strategies=specs,
        schedule=schedule,
        flops=flops,
        keep=keep,
        batch_sizes=tuple(dict.fromkeys(batch_sizes)),
        modes=tuple(each for each in MODES if mode in (each, "both")),
        dtype=dtype,
        rounds=rounds,
        parts=parts,
    )


def print_profile(
    settings: ProfileSettings, *, paper: bool, output: Path | None, console: Console
) -> None:
    """Measure, print, and write `output` as JSON.

    Raises:
        ConfigError: nothing to do, or a model that cannot be opened or reduced.
    """
    if not settings.models and not paper:
        raise ConfigError(f"--model: expected one or more, {FORMS}; or --paper")
    check_output("--output", output)
    if not console.is_terminal:
        console = Console(width=WIDTH)
    document: dict[str, Any] = {}
    if settings.models:
        with console.status("opening models") as status:
            profile = run_profile(settings, status.update)
        document = profile.as_json()
        console.print(table_of(profile))
        for each in profile.left_out:
            console.print(f"{each.model}: {each.strategy} is left out: {each.reason}", markup=False)
        if profile.parts:
            console.print(parts_table(profile.parts))
    if paper:
        clip, cross_modal = (
            from_checkout(name, "elip profile --paper") for name in ("paper_flops", "paper_table1")
        )
        with console.status("counting the paper's models"):
            table5, document["paper"] = clip.paper_report()
            table1, document["paper_table1"] = cross_modal.table1_report()
        console.print(table1, table5, sep="\n\n")
    if output is not None:
        output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
