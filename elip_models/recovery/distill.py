"""Train a reduced model to give the dense model's features, from images without labels.

    elip_models.distill(model, images, keep=0.5)
    elip_models.save_reduced(model, "distilled")

The teacher is a frozen dense copy. The loss of an image is

    (1 - cosine of the output features) + (mean over patches of 1 - cosine of the patch features)

The blocks train, in which tokens are merged; the embedding stays as it is. Patch features are those
of whole grids after the last norm; they count if the strategy keeps the grid, that is, if it merges
patches instead of dropping them.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.analysis.feature_measures import cosine, output_feature
from elip_models.api import is_reduced, record_stages, reduce_, reduction_summary, unreduce_
from elip_models.call_context import DenseCall, within
from elip_models.engine.install import reduction_of
from elip_models.saving.files import read_state, tensors_sha256, write_tensors
from elip_models.strategies.strategy import Strategy
from elip_models.towers import SelfReducingModel, as_reducible, as_tower, check_module
from elip_models.validation import (
    Bounds,
    Positive,
    PositiveInt,
    Seed,
    TrainingError,
    check,
    require_extra,
    shortened,
)
from elip_models.vlm.families import refuse_multimodal

with require_extra("elip_models.recovery"):
    from timm.optim import param_groups_weight_decay

M = TypeVar("M", bound=nn.Module)
Progress = Callable[[int, float], object]
LR, LORA_LR = 5e-6, 1e-4
WARMUP_SHARE, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.1, 1.0
SAVE_EVERY = 50
FORMAT = 4
"""The version of the checkpoint file."""
OPTIONS: dict[str, Any] = {
    "steps": PositiveInt,
    "batch_size": PositiveInt,
    "lr": Positive | None,
    "seed": Seed,
    "lora_rank": PositiveInt | None,
}
"""The types of the options of `distill` that a stopped run must have again."""


def distill(
    model: M,
    images: Tensor | Sequence[Tensor],
    *,
    keep: float | None = None,
    strategy: str | Strategy | None = None,
    steps: int = 500,
    batch_size: int = 8,
    lr: float | None = None,
    seed: int = 0,
    lora_rank: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: Progress = lambda step, loss: None,
) -> M:
    """Train a reduced model, in place and without labels, to give the dense model's features.

    Example::

        distill(model, images, keep=0.5)
        save_reduced(model, "distilled")

    It trains in eval mode, without dropout. The text side of an image-text model does not change.

    Args:
        model: of timm, open_clip or transformers, in fp32, on the device to train on. It is reduced
            by `reduce_`, unless it is reduced already and `keep` and `strategy` are None.
            Parameters outside the blocks, or that require no gradient, do not train.
        images: n images (3, H, W), normalised as the model expects: a tensor, or a sequence.
        keep: the mean share of tokens, as of `reduce_`.
        strategy: as of `reduce_`. It must reduce without a text.
        steps: steps of AdamW.
        batch_size: images in a step. Each epoch has another random order.
        lr: peak learning rate; None: 5e-6, or 1e-4 with LoRA.
        seed: of the order of the images, of LoRA and of the strategy.
        lora_rank: train LoRA adapters of this rank in the linear layers of the blocks, and merge
            them into the weights at the end. A run that is stopped leaves the weights as they were.
            None: train all weights of the blocks, which a stopped run has changed.
        checkpoint: a safetensors file for the state of the run, with its SHA-256, written at the
            start and every 50 steps. If it exists, the run continues from it, and ends as one that
            was not stopped. The model must have the weights with which the run began.
        progress: is called after each step with the number of steps and the loss.

    Returns:
        The model, reduced and in eval mode.

    Raises:
        ImportError: peft is missing, which LoRA needs.
        TypeError, ValueError: a wrong argument, a multimodal language model, whose image tower can
            be trained, or a checkpoint of another run.
        TrainingError: the loss, the gradient or a weight is not finite. A step whose gradient is
            not finite changes no weight.
    """
    options = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    options["lora_rank"] = lora_rank
    options = {name: check(name, value, OPTIONS[name]) for name, value in options.items()}
    check("checkpoint", checkpoint, str | os.PathLike | None)
    check_module(model, images, "distill")
    if not isinstance(images, Tensor | Sequence):
        raise TypeError(
            f"images: expected a tensor (n, 3, H, W) or a sequence of images, got "
            f"{shortened(images)}"
        )
    if not len(images):
        raise ValueError("images: expected at least one image, got none")
    first = images[0]
    if not isinstance(first, Tensor) or first.dim() != 3 or not first.is_floating_point():
        got = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else first
        raise TypeError(f"images: expected floating-point images (3, H, W), got {shortened(got)}")
    refuse_multimodal(model)
    student = _image_model(model)
    tower = as_tower(student)
    if not tower.has_dynamic_size and tuple(first.shape[1:]) != tower.image_size:
        height, width = tower.image_size
        raise ValueError(
            f"images: expected {height} x {width} pixels, got {tuple(first.shape[1:])}; "
            f"{tower.size_advice}"
        )
    if not is_reduced(model) or keep is not None or strategy is not None:
        reduce_(model, strategy, keep=keep)
    model.eval()
    teacher = unreduce_(copy.deepcopy(student)).requires_grad_(False)
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(options["seed"])
        with _only_blocks_train(student), _adapters(student, options["lora_rank"]):
            run = _Run(student, teacher, images, options)
            run.train(None if checkpoint is None else Path(checkpoint), progress)
    return model


def _image_model(model: nn.Module) -> nn.Module:
    """Return the image model to train; raise TypeError or ValueError if it cannot be trained."""
    reducible = as_reducible(model)
    if isinstance(reducible, SelfReducingModel):
        raise TypeError(
            "model: expected one of timm, open_clip or transformers, got "
            f"{type(model).__name__}, which `elip train` trains"
        )
    dtypes = {p.dtype for p in reducible.image_model.parameters() if p.requires_grad}
    if dtypes != {torch.float32}:
        got = ", ".join(map(str, dtypes)) or "none"
        raise ValueError(f"model: expected parameters in fp32 that require a gradient, got {got}")
    return reducible.image_model


@contextmanager
def _only_blocks_train(model: nn.Module) -> Iterator[None]:
    """Let only the blocks require a gradient inside the block."""
    inside = {id(parameter) for block in as_tower(model).blocks for parameter in block.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_()


@contextmanager
def _adapters(model: nn.Module, rank: int | None) -> Iterator[None]:
    """Add LoRA adapters to the linear layers of the blocks; merge them into the weights after.

    After an error they are removed, and the weights are as before.
    """
    if rank is None:
        yield
        return
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("lora_rank: expected None for a model that has adapters, which then train")
    with require_extra("lora_rank"):
        from peft import LoraConfig, inject_adapter_in_model
    inside = [module for block in as_tower(model).blocks for module in block.modules()]
    linear = {id(module) for module in inside if isinstance(module, nn.Linear)}
    for module in inside:  # layers whose weights the library reads, past an adapter
        if isinstance(module, nn.MultiheadAttention):
            linear -= {id(part) for part in module.modules()}
        elif getattr(module, "q_bias", None) is not None:
            linear -= {id(module.qkv)}
    layers = [name for name, module in model.named_modules() if id(module) in linear]
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), model)
    try:
        yield
        for name in layers:
            model.get_submodule(name).merge()
    finally:
        for name in layers:
            model.set_submodule(name, model.get_submodule(name).base_layer)
        del model.peft_config
        for parameter in required:
            parameter.requires_grad_()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, counted from 0: linear warm-up to `peak`, then a cosine to 0."""
    warmup = min(math.ceil(WARMUP_SHARE * steps), steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class _Run:
    """The training of a student: its optimiser, and its state in a file."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor | Sequence[Tensor],
        options: dict[str, Any],
    ) -> None:
        self.student, self.teacher, self.images = student, teacher, images
        steps, size = options["steps"], options["batch_size"]
        self.seed, self.done = options["seed"], 0
        self.peak_lr = options["lr"] or (LR if options["lora_rank"] is None else LORA_LR)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        groups = param_groups_weight_decay(student, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups)
        generator = torch.Generator().manual_seed(self.seed)
        epochs = math.ceil(steps * size / len(images))
        order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
        self.batches = order[: steps * size].split(size)
        ends = {"first": images[0], "last": images[len(images) - 1]}
        self.settings: dict[str, Any] = options | {
            "format": FORMAT,
            "strategy": str(reduction_summary(student).strategy),
            "images": [len(images), tensors_sha256(ends)],
            "model": tensors_sha256(student.state_dict()),
        }

    def train(self, checkpoint: Path | None, progress: Progress) -> None:
        """Run the steps that remain."""
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        elif checkpoint is not None:
            self._save(checkpoint, 0)  # a disk that is full is noticed here
        for i in range(self.done, len(self.batches)):
            loss = self._step(i)
            if checkpoint is not None and (i + 1) % SAVE_EVERY == 0:
                self._save(checkpoint, i + 1)
            progress(i + 1, loss)

    def _step(self, i: int) -> float:
        """Run step i and return its loss."""
        torch.manual_seed((self.seed << 32) + i)  # for strategies that draw tokens
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(i, len(self.batches), self.peak_lr)
        images = torch.stack([self.images[j] for j in self.batches[i].tolist()])
        images = images.to(next(self.student.parameters()).device)
        with torch.no_grad():
            expected = _outputs(self.teacher, images)
        loss = _loss(expected, _outputs(self.student, images))
        _require_finite("loss", i, loss)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = self.trained.values()
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        _require_finite("gradient norm", i, norm)
        self.optimizer.step()
        with torch.no_grad():
            _require_finite("norm of the weights", i, nn.utils.get_total_norm(parameters))
        return loss.item()

    def _save(self, path: Path, done: int) -> None:
        """Write the state after `done` steps, completely or not at all."""
        tensors: dict[str, Tensor] = {f"trained.{n}": p for n, p in self.trained.items()}
        for name, parameter in self.trained.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moment for key, moment in moments.items()}
        write_tensors(path, tensors, {"settings": self.settings, "done": done})

    @torch.no_grad()
    def _restore(self, path: Path) -> None:
        """Continue from a file of `_save`; ValueError if it is damaged or of another run."""
        try:
            state, tensors = read_state(path)
            check("settings", state.get("settings"), dict)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"checkpoint: expected a file of `distill`, got a damaged one: {error!s:.300}; "
                "remove it to start again"
            ) from error
        other = [
            name for name, value in self.settings.items() if state["settings"].get(name) != value
        ]
        if other:
            raise ValueError(
                f"checkpoint: expected a run with the same {', '.join(other)}, got another one in "
                f"{path}; remove it to start again"
            )
        self._check_shapes(path, tensors)
        check("checkpoint: done", state.get("done"), Annotated[int, Bounds(0, len(self.batches))])
        for name, parameter in self.trained.items():
            parameter.copy_(tensors.pop(f"trained.{name}"))
        for name, moment in tensors.items():
            key, _, trained = name.partition(".")
            moment = moment.to(self.trained[trained].device) if key != "step" else moment
            self.optimizer.state[self.trained[trained]][key] = moment
        self.done = state["done"]

    def _check_shapes(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError if tensors are not those that `_save` writes of this run."""
        shapes = {f"trained.{n}": p.shape for n, p in self.trained.items()}
        for name, parameter in self.trained.items():
            if f"step.{name}" in tensors:
                shapes |= {f"step.{name}": torch.Size()}
                shapes |= {f"{key}.{name}": parameter.shape for key in ("exp_avg", "exp_avg_sq")}
        stored = {name: tensor.shape for name, tensor in tensors.items()}
        if stored != shapes or {tensor.dtype for tensor in tensors.values()} != {torch.float32}:
            raise ValueError(
                f"checkpoint: expected the tensors of this model and their moments in fp32, got "
                f"others in {path}; remove it to start again"
            )


def _require_finite(name: str, i: int, value: Tensor) -> None:
    """Raise TrainingError if a value of step i is not finite."""
    if not value.isfinite():
        raise TrainingError(
            f"the {name} of step {i + 1} is {value.item()}; use a lower lr, and a model and images "
            "without NaN or infinity"
        )


def _outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the output features (B, D), and patch features (B, N, D) if the grid is kept."""
    tower, reduction, seen = as_tower(model), reduction_of(model), []
    strategy = None if reduction is None else reduction.strategy
    has_grid = strategy is None or not (
        strategy.changes_embedding or strategy.drops_patches or strategy.merge == "none"
    )
    last = tower.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
    record = nullcontext([]) if reduction is None else record_stages(model)
    on_grid = within(DenseCall(reduction)) if has_grid and reduction else nullcontext()
    try:
        with record as infos, on_grid:
            feature = output_feature(model(images))
    finally:
        last.remove()
    if strategy is not None and not strategy.changes_embedding and not infos:
        raise ValueError(
            "strategy: expected one that reduces images without a text and in eval mode, got "
            f"{strategy}"
        )
    if not has_grid:
        return feature, None
    tokens = tower.finish(seen[0] if isinstance(seen[0], Tensor) else seen[0][0])
    return feature, tokens[:, tower.num_prefix_tokens :]


def _loss(expected: tuple[Tensor, Tensor | None], got: tuple[Tensor, Tensor | None]) -> Tensor:
    loss = 1 - cosine(expected[0], got[0]).mean()
    if got[1] is None:
        return loss
    return loss + 1 - F.cosine_similarity(expected[1], got[1], dim=2).mean()
