"""Find the cheapest reduction of a model that changes its features of given images little.

    calibration = elip_models.calibrate(model, images, labels=labels, tolerance=0.02)
    print(calibration)                    # a table, and the choice as a sentence
    calibration.save("calibrated.json")
    elip_models.reduce_(model, "calibrated.json")

Each strategy is set to shares of the dense FLOPs between 0.95 and 0.30. A setting is within the
tolerance if the upper end of the 95% interval of its mean loss is. A strategy is tried at lower
shares only while it is within the tolerance, and not at shares that cannot improve on the cheapest
setting so far. This assumes that the loss rises as the FLOPs fall. The settings that were tried are
timed side by side.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from elip_models.analysis.calibration import Calibration, Trial
from elip_models.analysis.feature_measures import cosine, neighbours, output_feature
from elip_models.analysis.probe import ProbeLoss
from elip_models.api import is_reduced, reduce_
from elip_models.intervals import Interval, bootstrap_interval, score_interval
from elip_models.profiling.measure import measured_on, ratios_to, time_side_by_side
from elip_models.profiling.workload import shared_copy
from elip_models.strategies import STRATEGIES as BUILT_IN
from elip_models.strategies.flops import TOLERANCE, at_flops, inference_ratio
from elip_models.strategies.spec import get_strategy, option_types, parse_spec
from elip_models.strategies.strategy import Strategy
from elip_models.towers import Tower, as_reducible, as_tower, check_module
from elip_models.validation import PositiveInt, PositiveShare, check, did_you_mean, shortened
from elip_models.vlm.families import refuse_multimodal

Metric = Callable[[Tensor, Tensor], Tensor]
"""A function of dense and reduced features, (n, D), that returns what each image loses, (n,)."""

METRICS: dict[str, Metric] = {
    "cosine": lambda dense, reduced: 1 - cosine(dense, reduced),
    "neighbours": lambda dense, reduced: 1 - neighbours(dense, reduced),
}
DEFAULT_METRIC, TOP1 = "cosine", "top-1"
LEFT_OUT = ("trips", "random")  # needs a text; a control
STRATEGIES = tuple(
    f"{name}:without_text=vision" if "without_text" in option_types(name) else name
    for name, strategy in BUILT_IN.items()
    if not strategy.training_only and name not in LEFT_OUT
)
"""Every built-in strategy that reduces in inference and needs no text, except the control `random`.
They are in the order of their results on photographs: a good one first saves trials of others."""
SHARES = tuple(round(0.95 - 0.05 * i, 2) for i in range(14))
"""Of the dense FLOPs, from 0.95 to 0.30."""
MIN_IMAGES = 8
ROUNDS = 5


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    tolerance: float = 0.01,
    metric: str | Metric | None = None,
    strategies: Sequence[str] = STRATEGIES,
    class_token_only: bool = False,
    batch_size: int = 8,
    every: bool = False,
    time: bool = True,
    progress: Callable[[str], object] = lambda text: None,
) -> Calibration:
    """Find the cheapest reduction whose features differ from the dense ones within a tolerance.

    Example::

        calibration = calibrate(model, images, labels=labels, tolerance=0.02)
        print(calibration)  # every setting that was tried, and the choice
        calibration.save("calibrated.json")
        reduce_(model, "calibrated.json")

    Args:
        model: an image model of timm, open_clip or transformers, not reduced, on the device to
            measure; or a whole image-text model, of which the image model is calibrated.
        images: (n, 3, H, W), at least 8, normalised as the model expects. They should be like the
            images of the application; a hundred are enough to begin with.
        labels: (n,) int64, the class of each image, from 0. The loss is then the top-1 accuracy
            that a linear probe of dense features loses on reduced ones, cross-validated in five
            folds: each class needs five images. A thousand images are enough to begin with.
        tolerance: the largest mean loss, in (0, 1]; with labels, 0.01 is one point.
        metric: without labels; 'cosine' (default), the loss 1 - cosine of dense and reduced
            feature; 'neighbours', the share of the ten nearest neighbours among these images that
            change; or a function of dense and reduced features (n, D) that returns the loss of
            each image, (n,). A feature is what the model returns for an image.
        strategies: lines of text for `get_strategy`, without a setting of the number of tokens.
        class_token_only: the application uses the class token of the last block, or what is pooled
            from it, and no patches: strategies with this setting get it (see `ToMe`).
        batch_size: images in a batch, for features and times.
        every: try every strategy at every share, without the search.
        time: time the settings. Without times the choice goes by FLOPs.
        progress: is called with a line of text before each measurement.

    Returns:
        The settings that were tried, and the choice.

    Raises:
        TypeError, ValueError: a wrong argument, a model that cannot be reduced or is already, or
            labels that the probe does not predict better than the most frequent class does.
    """
    tolerance = check("tolerance", tolerance, PositiveShare)
    for name, flag in (("every", every), ("time", time), ("class_token_only", class_token_only)):
        check(name, flag, bool)
    if isinstance(strategies, str) or not all(isinstance(text, str) for text in strategies):
        raise TypeError(
            f"strategies: expected a sequence of texts such as 'tome', got {shortened(strategies)}"
        )
    features = _Features(model, images, _metric(metric, labels, images), batch_size)
    search = _Search(features, tolerance, every=every, progress=progress)
    for text in strategies:
        name, settings = parse_spec(text)
        if class_token_only and "class_token_only" in option_types(name):
            text += f"{',' if settings else ':'}class_token_only=true"
        search.add(text)
    trials = search.trials
    if time and trials:
        progress("times")
        trials = features.timed(trials)
    if labels is not None:
        metric = TOP1
    return Calibration(
        metric=getattr(metric, "__name__", None) or str(metric or DEFAULT_METRIC),
        tolerance=tolerance,
        images=len(images),
        trials=tuple(trials),
        dense_accuracy=features.metric.accuracy if labels is not None else None,
        refused=search.refused,
        measured_on=measured_on(images.device) | {"batch_size": features.batch_size},
    )


class _Features:
    """The dense features of the images, and the losses and times of reduced copies of the model."""

    def __init__(self, model: nn.Module, images: Tensor, metric: Metric, batch_size: int) -> None:
        check_module(model, images, "calibrate")
        refuse_multimodal(model)
        if is_reduced(model):
            raise ValueError(
                "model: expected one that reduce_ has not changed, got a reduced one; "
                "call unreduce_ first"
            )
        self.model = shared_copy(as_reducible(model).image_model).eval()
        self.tower = as_tower(self.model)
        self.images = _checked(images, self.tower)
        self.batch_size = min(check("batch_size", batch_size, PositiveInt), len(images))
        self.metric = metric
        self.dense = self._dense()
        self.size = self.tower.size
        if self.tower.has_dynamic_size:
            tokens = self.tower.embed(images[:1]).shape[1]
            patches = tokens - self.tower.num_prefix_tokens
            self.size = self.size._replace(num_patches=patches)

    def _dense(self) -> Tensor:
        """Return the features of the dense model; ValueError for images of another type."""
        weight = next(self.model.parameters())
        expected, got = ((x.dtype, str(x.device)) for x in (weight, self.images))
        try:
            return self.of(self.model)
        except RuntimeError as error:
            if expected == got:
                raise
            raise ValueError(
                f"images: expected the type and device of the model, {expected[0]} on "
                f"{expected[1]}, got {got[0]} on {got[1]}: {error!s:.200}; pass "
                "images.to(device, dtype)"
            ) from error

    def of(self, model: nn.Module, name: str = "the dense model") -> Tensor:
        """Return the features (n, D) in fp32 on the CPU; ValueError if some are not finite."""
        batches = self.images.split(self.batch_size)
        features = torch.cat([output_feature(model(batch)).float().cpu() for batch in batches])
        bad = (~features.isfinite().all(1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"images: expected finite features, got NaN or infinity of {name} for {len(bad)} "
                f"of {len(features)} images, the first of which is images[{bad[0]}]; remove these "
                "images, or use fp32 or other weights"
            )
        return features

    def loss(self, strategy: Strategy) -> Interval:
        """Return the mean loss of the model with this strategy."""
        losses = self.metric(self.dense, self.of(self._reduced(strategy), str(strategy)))
        if not isinstance(losses, Tensor) or losses.shape != (len(self.images),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TypeError(
                f"metric: expected a function that returns a tensor ({len(self.images)},), the "
                f"loss of each image, got {got}"
            )
        if not losses.isfinite().all():
            raise ValueError(
                f"metric: expected finite losses, got a sum of {losses.sum().item()} with "
                f"{strategy}; correct the function"
            )
        if isinstance(self.metric, ProbeLoss) and not losses.any():
            return score_interval(losses.double().numpy())  # of equal values, which is not 0 wide
        return bootstrap_interval(losses.double().numpy())

    def timed(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials with the time of a batch relative to dense."""
        models = [self.model, *(self._reduced(trial.strategy) for trial in trials)]
        batch = self.images[: self.batch_size]
        steps = {str(i): partial(model, batch) for i, model in enumerate(models)}
        times = time_side_by_side(steps, device=batch.device, rounds=ROUNDS)
        ratios = ratios_to("0", times)
        return [trial._replace(time=ratios[str(i)]) for i, trial in enumerate(trials, start=1)]

    def _reduced(self, strategy: Strategy) -> nn.Module:
        return reduce_(shared_copy(self.model), strategy=strategy)


class _Search:
    """Tries settings that may be cheaper than the best one so far."""

    def __init__(
        self,
        features: _Features,
        tolerance: float,
        *,
        every: bool,
        progress: Callable[[str], object],
    ) -> None:
        self.features, self.tolerance = features, tolerance
        self.every, self.progress = every, progress
        self.trials: list[Trial] = []
        self.refused: dict[str, str] = {}

    def add(self, text: str) -> None:
        """Try a strategy at falling shares of the FLOPs."""
        try:
            strategy = get_strategy(text).fitted(self.features.tower)
        except TypeError as error:
            self.refused[text] = str(error)
            return
        if self.every:
            for share in SHARES:
                self._is_within(strategy, share)
            return
        within = (trial.flops for trial in self.trials if trial.loss.high <= self.tolerance)
        best = min(within, default=1.0)
        shares = [share for share in SHARES if share < best - TOLERANCE]
        if not shares or not self._is_within(strategy, shares[0]):
            return
        low, high = 0, len(shares)  # within; not within, or not known
        while high - low > 1:
            middle = (low + high) // 2
            if self._is_within(strategy, shares[middle]):
                low = middle
            else:
                high = middle

    def _is_within(self, strategy: Strategy, share: float) -> bool:
        """Try the setting that is nearest to the share; return whether it is within."""
        size = self.features.size
        setting = at_flops(strategy, size, share, training=False, exactly=False)
        flops = inference_ratio(setting, size)
        if flops >= 1:  # nothing is reduced
            return True
        trial = next((trial for trial in self.trials if trial.strategy == setting), None)
        if trial is None:
            self.progress(f"{strategy.name} at {flops:.2f} of the dense FLOPs")
            trial = Trial(setting, flops, self.features.loss(setting))
            self.trials.append(trial)
        return trial.loss.high <= self.tolerance


def _metric(metric: str | Metric | None, labels: Tensor | None, images: Tensor) -> Metric:
    """Return the loss of each image as a function of dense and reduced features."""
    if labels is not None:
        if metric is not None:
            raise ValueError(
                f"metric: expected none with labels, whose loss is that of top-1, got {metric!r}"
            )
        if isinstance(labels, Tensor) and labels.dim() and len(labels) != len(images):
            raise ValueError(f"labels: expected {len(images)}, one an image, got {len(labels)}")
        return ProbeLoss(labels)
    metric = DEFAULT_METRIC if metric is None else metric
    if metric not in METRICS if isinstance(metric, str) else not callable(metric):
        raise ValueError(
            f"metric: expected {' or '.join(METRICS)}, or a function, got {shortened(metric)}"
            f"{did_you_mean(metric, METRICS)}"
        )
    return METRICS[metric] if isinstance(metric, str) else metric


def _checked(images: Tensor, tower: Tower) -> Tensor:
    """Return the images; raise TypeError or ValueError if there are too few, or of another size."""
    expected = f"a floating-point tensor (n, 3, H, W) of at least {MIN_IMAGES} images"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected {expected}, got {got}")
    if images.dim() != 4 or images.shape[1] != 3 or len(images) < MIN_IMAGES:
        raise ValueError(f"images: expected {expected}, got {tuple(images.shape)}")
    if not tower.has_dynamic_size and tuple(images.shape[2:]) != tower.image_size:
        height, width = tower.image_size
        raise ValueError(
            f"images: expected {height} x {width} pixels, got {tuple(images.shape[2:])}; "
            f"{tower.size_advice}"
        )
    return images
