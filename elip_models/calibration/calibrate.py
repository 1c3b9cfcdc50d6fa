"""Find the fastest reduction that a user's own task allows, and measure it on images held back.

    results = elip_models.calibrate(model, images, labels=labels, tolerance=0.01)
    print(results.sentence())
    results.save("calibrated")
    elip_models.reduce_(model, "calibrated/best.json")

The images are split into halves. On the first, each strategy is set to shares of the dense FLOPs
between 0.95 and 0.30, and the settings within the tolerance are timed side by side. The fastest of
them are tested on the second half, the slowest first, until one fails. The last that passes is the
choice, and what it loses there is reported.
"""

import copy
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from elip_kernels import __version__
from elip_models.analysis.model_features import image_features
from elip_models.api import is_reduced
from elip_models.calibration.candidates import Candidate
from elip_models.calibration.choice import fixed_sequence, is_within
from elip_models.calibration.classes import Probe
from elip_models.calibration.costs import Cost
from elip_models.calibration.features import Cosine, FeatureTask, Loss, Neighbours, OwnLoss
from elip_models.calibration.images import ImageTask
from elip_models.calibration.results import Results
from elip_models.calibration.run import Run
from elip_models.calibration.task import Task
from elip_models.profiling.measure import installed_versions, measured_on, no_gain
from elip_models.profiling.workload import shared_copy
from elip_models.towers import check_module
from elip_models.validation import (
    Count,
    NonNegative,
    PositiveInt,
    PositiveShare,
    check,
    did_you_mean,
    shortened,
)
from elip_models.vlm.families import refuse_multimodal

FEATURE_TASKS: dict[str, type[FeatureTask]] = {Cosine.name: Cosine, Neighbours.name: Neighbours}
PROBES = {"probe": False, "own-probe": True}
TIME_NOISE = 0.03  # of the dense time
TESTED = 3  # on the images held back, at most
VERSIONS = ("torch", "timm", "transformers", "open_clip_torch")


def nothing(value: object) -> None:
    """Ignore a line of text, or a model."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Tensor | Sequence[Tensor] | None = None,
    *,
    labels: Tensor | None = None,
    task: str | Task | Loss | None = None,
    tolerance: float = 0.01,
    strategies: Sequence[str] | None = None,
    compare: Sequence[str] = (),
    class_token_only: bool = False,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    seed: int = 0,
    every: bool = False,
    time: bool = True,
    minutes: float = 0.0,
    distill: int = 0,
    save: Callable[[nn.Module], object] = nothing,
    folder: str | os.PathLike | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[str], object] = nothing,
    announce: Callable[[str], object] = nothing,
    metric: str | Loss | None = None,
) -> Results:
    """Find the fastest reduction whose loss by the user's own measure is within a tolerance.

    Example::

        results = calibrate(model, images, labels=labels)
        print(results.table())      # every setting that was tried
        print(results.sentence())   # the choice, and its loss on the images held back
        results.save("calibrated")
        reduce_(model, "calibrated/best.json")

    Args:
        model: a model of timm, open_clip or transformers, not reduced, on the device to measure.
        images: (n, 3, H, W), or a sequence of images (3, H, W), normalised as the model expects.
            They should be like the images of the application. None if `task` has them.
        labels: (n,) int64, the class of each image, from 0, for a probe: ten images of each class.
        task: 'cosine', 'neighbours', or a function of dense and reduced features (n, D) that
            returns the loss of each image, (n,); with labels 'probe' or 'own-probe'; or a task of
            `elip_models.calibration`, such as `Head`. None: 'probe' with labels, else 'cosine'.
        tolerance: the largest loss, in (0, 1]; 0.01 is one point of accuracy. The lower end of the
            95% interval of the difference from the dense model must be above minus the tolerance.
        strategies: lines of text for `get_strategy`, without a setting of the number of tokens.
            None: all that reduce this model in inference.
        compare: further settings to measure, such as 'evit 0.7', which are not chosen.
        class_token_only: the application uses the class token of the last block, or what is pooled
            from it, and no patches: strategies with this setting get it (see `ToMe`).
        batch_size: images in a batch, for outputs and times. Times are those of one image, too.
        dtype: the precision to measure in; None: that of the model.
        compile: time models that torch.compile has compiled; of each strategy, the setting with
            the fewest FLOPs.
        seed: of the split.
        every: try every strategy at every share, without the search.
        time: time the settings. Without times the choice goes by FLOPs.
        minutes: use only as many images as a run of about this time can measure on this machine,
            of each class its share; 0 for all. Training takes longer.
        distill: steps of `distill`, which trains the setting one step cheaper than the choice on
            the images that choose; 0 for none. It needs a model in fp32.
        save: is called with the trained model.
        folder: where outputs are stored, so that a stopped run goes on; None: in memory.
        names: the file name of each image, for the report.
        progress: is called with a line of text while the run goes on.
        announce: is called with the number of images that `minutes` allows, and with the first
            answer of a long run, which may still change.
        metric: the deprecated name of `task`.

    Returns:
        The settings that were tried, the choice, and its loss on the images held back.

    Raises:
        TypeError, ValueError: a wrong argument, a model that cannot be reduced or is already, or
            labels that the dense model does not predict better than chance.
    """
    if metric is not None:
        message = "calibrate: `metric` is now `task`; version 0.3.0 removes `metric`"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
        task = metric
    tolerance = check("tolerance", tolerance, PositiveShare)
    flags = {"every": every, "time": time, "class_token_only": class_token_only, "compile": compile}
    for name, flag in flags.items():
        check(name, flag, bool)
    batch_size = check("batch_size", batch_size, PositiveInt)
    distill, seed = check("distill", distill, Count), check("seed", seed, Count)
    minutes = check("minutes", minutes, NonNegative)
    check("dtype", dtype, torch.dtype | None)
    check("folder", folder, str | os.PathLike | None)
    for name, texts in (("strategies", strategies), ("compare", compare), ("names", names)):
        _check_texts(name, texts)
    check_module(model, images, "calibrate")
    if is_reduced(model):
        raise ValueError(
            "model: expected one that reduce_ has not changed, got a reduced one; call unreduce_ "
            "first"
        )
    original = shared_copy(model).eval()
    if not isinstance(task, Task):
        refuse_multimodal(model)
        task = _task(original, images, labels, task, batch_size)
    if not isinstance(task, ImageTask):
        _check_unused(task, compile=compile, distill=distill)
    is_other = dtype not in (None, next(original.parameters()).dtype)
    measured = copy.deepcopy(original).to(dtype) if is_other else original
    if names is not None and len(names) != task.count:
        raise ValueError(f"names: expected {task.count}, one an image, got {len(names)}")
    run = Run(
        measured,
        task,
        tolerance,
        seed=seed,
        minutes=minutes,
        folder=folder,
        progress=progress,
        announce=announce,
        batch_size=batch_size,
    )
    candidates = task.candidates(measured, class_token_only=class_token_only)
    ladders: dict[str, list[Candidate]] = {}
    refused: dict[str, str] = {}
    for text in candidates.strategies if strategies is None else strategies:
        try:
            ladders[text] = candidates.falling(text)
        except TypeError as error:
            refused[text] = str(error)
    also = [candidates.compared(text) for text in compare]
    search = run.searched(ladders, every=every)
    timed = _cheapest(search.within) if compile else search.within
    costs = run.costs([*timed, *also], compile=compile) if time else {}
    tested, chosen = fixed_sequence(_slowest_first(search.within, costs), run.is_confirmed)
    chosen = chosen or next(iter(tested), None)
    nearest = chosen or max(search.tried, key=run.lower_end, default=None)
    control = None if nearest is None else candidates.control(nearest.flops)
    if control is not None and time and control.name not in costs:
        costs |= run.costs([control], compile=compile)
    roles = {setting.name: "control" for setting in search.tried if setting.is_control}
    roles |= {} if control is None else {control.name: "control"}
    roles |= {setting.name: "compared" for setting in also}
    roles |= {} if chosen is None else {chosen.name: "chosen"}
    apart = [setting for setting in (chosen, control, *tested, *also) if setting is not None]
    settings = {setting.name: setting for setting in (*search.tried, *apart)}
    held_back = {setting.name for setting in apart}
    reported = [
        run.setting(setting, roles.get(name, "tried"), costs.get(name), held_back=name in held_back)
        for name, setting in settings.items()
    ]
    if distill and nearest is not None:
        cheaper = _one_step_cheaper(nearest, ladders) if chosen else nearest
        reported.append(
            run.distilled(original, cheaper, distill, compile=compile, time=time, save=save)
        )
    by_name = {setting.name: setting for setting in reported}
    choice = None if chosen is None else by_name[chosen.name]
    confirmed = choice is not None and is_within(choice.held_back[run.decides], tolerance)
    return Results(
        task=task.name,
        measures=task.measures,
        tolerance=tolerance,
        model=type(model).__name__,
        counts={name: len(part) for name, part in run.parts._asdict().items()},
        dense=run.dense_scores(),
        settings=tuple(reported),
        chosen=choice,
        nearest=None if nearest is None else by_name[nearest.name],
        confirmed=confirmed,
        needed=None if confirmed else run.needed(choice, search.tried),
        refused=refused,
        machine=measured_on(run.device)
        | {"batch_size": batch_size, "dtype": str(run.dtype).removeprefix("torch.")}
        | {"compile": compile, "elip-kernels": __version__, **installed_versions(VERSIONS)},
        worst=() if nearest is None else run.worst(nearest, names),
    )


def _task(
    model: nn.Module,
    images: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None,
    task: str | Loss | None,
    batch_size: int,
) -> Task:
    """Return the task on images that a name or a function describes; the model loses its head."""
    features, _ = image_features(model)
    task = task or (Cosine.name if labels is None else Probe.name)
    if labels is not None:
        if task not in PROBES:
            raise ValueError(
                f"task: expected {' or '.join(map(repr, PROBES))}, or a task, with labels, got "
                f"{shortened(task)}"
            )
        return Probe(images, labels, features=features, own=PROBES[task], batch_size=batch_size)
    if callable(task):
        return OwnLoss(images, loss=task, features=features, batch_size=batch_size)
    if task not in FEATURE_TASKS:
        needs = "; pass labels" if task in PROBES else did_you_mean(task, FEATURE_TASKS)
        raise ValueError(
            f"task: expected {' or '.join(map(repr, FEATURE_TASKS))}, a function or a task, got "
            f"{shortened(task)}{needs}"
        )
    return FEATURE_TASKS[task](images, features=features, batch_size=batch_size)


def _check_unused(task: Task, **options: bool | int) -> None:
    """Raise ValueError for an option of models that take images alone."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name}: expected {type(value)()} with the task {task.name!r}, whose model takes "
                f"more than images, got {value}"
            )


def _check_texts(name: str, texts: Sequence[str] | None) -> None:
    is_text = isinstance(texts, str) or not isinstance(texts, Sequence | None)
    if is_text or not all(isinstance(text, str) for text in texts or ()):
        raise TypeError(
            f"{name}: expected a sequence of texts such as 'tome', got {shortened(texts)}"
        )


def _cheapest(within: Sequence[Candidate]) -> list[Candidate]:
    """Return the setting of each strategy that has the fewest FLOPs: compiling takes long."""
    falling = sorted(within, key=lambda setting: setting.flops, reverse=True)
    return list({setting.settings["strategy"]: setting for setting in falling}.values())


def _fastest(within: Sequence[Candidate], costs: dict[str, Cost]) -> Candidate | None:
    """Return the fastest setting; of times that differ by less than 0.03, that of fewest FLOPs."""
    if within and costs:
        times = {s.name: costs[s.name].deciding for s in within if s.name in costs}
        limit = min(times.values()) + TIME_NOISE
        within = [s for s in within if times.get(s.name, limit + 1) <= limit]
    return min(within, key=lambda setting: setting.flops, default=None)


def _slowest_first(within: Sequence[Candidate], costs: dict[str, Cost]) -> list[Candidate]:
    """Return the fastest settings, each with more FLOPs than the next.

    Settings that save no time are returned only if none saves any.
    """
    fastest: list[Candidate] = []
    gains = [s for s in within if s.name in costs and not no_gain(costs[s.name].deciding)]
    within = gains or within
    while len(fastest) < TESTED and (found := _fastest(within, costs)) is not None:
        fastest.insert(0, found)
        within = [setting for setting in within if setting.flops > found.flops]
    return fastest


def _one_step_cheaper(setting: Candidate, ladders: dict[str, list[Candidate]]) -> Candidate:
    """Return the next setting of the same strategy, or the same one if it is the last."""
    for ladder in ladders.values():
        if setting in ladder:
            return ladder[min(ladder.index(setting) + 1, len(ladder) - 1)]
    return setting
