"""The configuration of a run: frozen pydantic dataclasses whose fields are the keys of a recipe.

A field is the only place of a key's type, bounds, default and meaning. Importing this file imports
no PyTorch, so that `elip train --help` is fast.
"""

from dataclasses import field
from typing import Annotated, Any, Literal, Self

from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.validation import LARGEST, require_extra

with require_extra("elip_models.pretraining.training"):
    from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
    from pydantic.dataclasses import dataclass

Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # of a tensor; a mistake must not take all memory
CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass(frozen=True, config=CONFIG)
class ModelConfig:
    """The model, `elip_models.create_model(name, **overrides)`, and its initial weights."""

    name: str
    """Name of a model, as in `list_models`."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config. Fields that follow from the tokenizer are set automatically."""
    vision_init: str | None = None
    """Initial weights of the image tower, "timm:NAME"; null: random."""
    text_init: str | None = None
    """Initial weights of the text encoder, "hf:NAME" or "hf:FOLDER"; null: random."""
    pretrained: str | None = None
    """Initial weights of the whole model, instead of the two above: a file or folder of the same
    family, in a format that `elip convert` reads. A resumed run does not load them."""
    allow_missing: tuple[str, ...] = ()
    """Patterns of parameter names, such as "logit_bias" or "itm_head.*", that `pretrained` may
    lack. These parameters are newly initialised."""
    allow_unexpected: tuple[str, ...] = ()
    """Patterns of names in `pretrained` that are dropped."""

    @model_validator(mode="after")
    def _has_one_start(self) -> Self:
        if self.pretrained and (self.vision_init or self.text_init):
            raise ValueError("pretrained: must be null with model.vision_init or model.text_init")
        return self


@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """The data of a run, and how captions become tokens."""

    train: str | dict[str, Any] | tuple[str, ...]
    """A source specification as in `open_source`, or several, which are mixed. Pre-training also
    takes one stream, see `StreamSource`: {stream: "https://..", samples: 1000000}."""
    weights: tuple[Positive, ...] | None = None
    """How often the samples of each source are drawn in an epoch; null: once each."""
    eval: str | None = None
    """Source of the evaluation; null: no evaluation."""
    validation: str | None = None
    """Source of the validation split of a downstream task, evaluated during training. `eval.select`
    selects weights by it. It must be another one than `eval`, the test split."""
    zero_shot: str | None = None
    """Images for zero-shot classification as in `open_classes`: "emoji_classes:seed=1,size=600", or
    a folder with one folder of images for each class; null: no classification."""
    tokenizer: str = "train"
    """A local folder or hub name; "train" trains one on the captions of `train`."""
    vocab_size: Size = 8192
    """Largest vocabulary of a tokenizer that the run trains."""
    context_length: Size = 32
    """Number of tokens to which a caption is padded or truncated."""
    captions: Literal["plain", "albef", "blip", "blip_question"] | None = None
    """Caption cleaning: "plain", or the rules of "albef" or "blip", and "blip_question" for BLIP's
    VQA; null: as in the model's config."""
    max_words: PositiveInt | None = None
    """Number of words that these rules keep; null: as in the model's config, 30."""
    resize: Literal["crop", "squash"] | None = None
    """How evaluation images are resized: "crop" cuts out the centre, "squash" ignores the aspect
    ratio; null: as in the model's config."""
    crop_scale: tuple[Share, Share] | None = (0.9, 1.0)
    """Lower and upper share of an image's area in a random crop; null: training images are resized
    like evaluation images."""
    flip: bool = False
    """Mirror every second image. Not for captions that contain left and right."""
    randaugment: (
        tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=0, le=10)]] | None
    ) = None
    """Number of operations and magnitude, up to 10, of RandAugment; null: none."""
    randaugment_policy: Literal["albef", "meter"] = "albef"
    """Operations of RandAugment: those of "albef", after the crop, or those of "meter", on the
    image before it is resized."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Loader processes for each rank; 0 loads in the training process."""
    max_bad_share: Share = 0.05
    """Largest share of unreadable samples before the run ends."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        sources = len(self.train) if isinstance(self.train, tuple) else 1
        if self.weights is not None and len(self.weights) != sources:
            raise ValueError(
                f"weights: expected one for each of the {sources} sources of data.train, got "
                f"{len(self.weights)}"
            )
        if self.validation is not None and self.validation == self.eval:
            raise ValueError(
                "validation: expected another split than data.eval, whose scores are the result"
            )
        return self


@dataclass(frozen=True, config=CONFIG)
class OptimConfig:
    """AdamW and its learning rate: linear warm-up, then decay."""

    batch_size: PositiveInt
    """Images for each rank and forward pass. An optimiser step uses `grad_accumulation` times as
    many on each rank."""
    lr: Positive
    """Peak learning rate."""
    steps: PositiveInt | None = None
    """Optimiser steps; takes precedence over `epochs`."""
    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Passes over the training data."""
    grad_accumulation: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Forward passes for each optimiser step."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up, at most a fifth of the run."""
    warmup_lr: NonNegative | None = None
    """Learning rate of the first step, which rises to `lr`; null: the first of `warmup_steps` equal
    parts of `lr`."""
    decay: Literal["cosine", "linear", "step"] = "cosine"
    """Decay after warm-up: "cosine" or "linear" to `min_lr` at the end, or "step", by `decay_rate`
    each epoch, down to `min_lr`."""
    decay_each: Literal["step", "epoch"] = "step"
    """When the decay acts: "step", or "epoch" for a rate that is constant within an epoch."""
    min_lr: NonNegative = 0.0
    """Lowest learning rate of the decay."""
    decay_rate: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor of the decay "step"."""
    lr_scale: dict[str, Positive] = field(default_factory=dict)
    """Multiples of the learning rate by pattern of parameter names, such as {"itm_head.*": 5}. The
    first pattern that matches counts."""
    weight_decay: NonNegative = 0.1
    """Weight decay of all parameters except those in `no_decay`."""
    no_decay: tuple[str, ...] | None = None
    """Patterns of parameter names, such as "*.bias"; null: biases, norms, single vectors and the
    temperature."""
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    """The two betas of AdamW."""
    eps: Positive = 1e-6
    """The epsilon of AdamW."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are clipped to this norm; null: not clipped."""
    max_nonfinite_steps: PositiveInt = 20
    """Number of steps in a row with a loss or gradient that is not finite, after which the run
    ends. Such steps are skipped."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of training: "fp32", or autocast to "bf16" or "fp16"."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    batch_slices: PositiveInt = 1
    """Number of slices in which CLIP encodes a batch, recomputed in backward. Gradients are those
    of the whole batch, memory is that of one slice."""
    compile: bool | Literal["inductor", "aot_eager", "eager"] = False
    """Compile the model for training steps with torch.compile; true, or the name of a backend.
    Evaluation is not compiled."""
    gather: Literal["local", "global"] = "local"
    """Contrast within a rank ("local") or over all ranks ("global")."""
    shard: bool = False
    """Shard CLIP or METER over the ranks by FSDP2, instead of replicating the model."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, limit in (("batch_slices", "batch_size"), ("min_lr", "lr"), ("warmup_lr", "lr")):
            value, most = getattr(self, name), getattr(self, limit)
            if value is not None and value > most:
                raise ValueError(f"{name}: must be at most optim.{limit} = {most}, got {value}")
        return self


@dataclass(frozen=True, config=CONFIG)
class EvalConfig:
    """Which weights of a fine-tuning run are its result."""

    select: str | tuple[str, ...] | None = None
    """Metric of the task, such as "accuracy", or several, whose mean counts: the weights with the
    highest value on `data.validation` are stored in `best` and are the result. null: the last
    weights are the result."""


@dataclass(frozen=True, config=CONFIG)
class RunConfig:
    """One training run."""

    name: str
    """Name of the run in trackers and summaries."""
    output_dir: Annotated[str, Field(pattern=r"\S")]
    """Folder for checkpoints, logs and the final model."""
    model: ModelConfig
    """The model and its initial weights."""
    data: DataConfig
    """The data and its preparation."""
    optim: OptimConfig
    """The optimiser and its learning rate."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initialisation, data order and augmentation."""
    log_every: PositiveInt = 10
    """Steps between two rows of the log."""
    eval_every: NonNegativeInt = 0
    """Steps between two evaluations on `data.eval` and `data.zero_shot`. 0 evaluates only what
    `report` names, at the end. With `data.validation`, steps between two evaluations on it; 0: once
    in an epoch. `data.eval` is then evaluated at the end only."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Which weights are the result."""
    checkpoint_every: PositiveInt = 1000
    """Steps between two checkpoints. The last step always has one."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep, the newest."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of `accelerate` trackers, such as "tensorboard" or "wandb"."""
    report: tuple[Literal["retrieval", "zero_shot", "timing", "picture"], ...] = ()
    """What is reported after pre-training. A downstream task always reports its scores."""
    task: str | None = None
    """The downstream task; null: pre-training. A name in
    `elip_models.pretraining.tasks.registry.TASKS`. `data.train` and `data.eval` are the task's
    data."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task, fields of its class."""
    peft: AdaptConfig = field(default_factory=AdaptConfig)
    """Which parameters train: all, or adapters on frozen weights."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        data, reports = self.data, set(self.report)
        if self.optim.steps is None and self.optim.epochs is None:
            raise ValueError("optim.steps: expected it or optim.epochs to be set, got neither")
        if self.task is None and (data.validation or self.eval.select):
            raise ValueError(
                "eval.select, data.validation: expected null in pre-training, which has no task"
            )
        if self.task is not None and (reports or data.zero_shot):
            raise ValueError(
                f"report, data.zero_shot: expected [] and null for the task {self.task}, which is "
                "scored on data.eval at the end"
            )
        if "zero_shot" in reports and data.zero_shot is None:
            raise ValueError("data.zero_shot: expected a source, since report names it, got null")
        if self.eval.select and data.validation is None:
            raise ValueError(
                "data.validation: expected a source, since eval.select selects weights by it, got "
                "null; or set eval.select=null"
            )
        is_scored = reports - {"zero_shot"} or (self.eval_every and data.zero_shot is None)
        if is_scored and data.eval is None:
            raise ValueError(
                "data.eval: expected a source, since eval_every or report needs one, got null; "
                "or set eval_every=0 and report=[]"
            )
        return self
