"""The configuration of a run: frozen dataclasses whose fields are the keys of a recipe.

Importing it imports no PyTorch, so that `elip train --help` is fast.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.validation import (
    Bounds,
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    PositiveShare,
    Rate,
    Seed,
    Share,
    Size,
    Workers,
)


@dataclass(frozen=True)
class ModelConfig:
    """The model, `elip_models.create_model(name, **overrides)`, and its initial weights.

    Attributes:
        name: Name of a model, as in `list_models`.
        overrides: Fields of the model's config. Fields that follow from the tokenizer are set
            automatically.
        vision_init: "timm:NAME", the initial weights of the image tower; None: random.
        text_init: "hf:NAME" or "hf:FOLDER", the initial weights of the text encoder; None: random.
        pretrained: File or folder of a model of the same family, in a format that `elip convert`
            reads: initial weights of the whole model, instead of the two above. The run prints
            which weights were loaded, interpolated, copied to momentum encoders, newly initialised
            and dropped. A resumed run does not load them.
        allow_missing: Patterns of parameter names, such as "logit_bias" or "itm_head.*", that
            `pretrained` may lack. These parameters are newly initialised.
        allow_unexpected: Patterns of names in `pretrained` that are dropped. Together with
            `allow_missing` a part of the model can be initialised anew.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    vision_init: str | None = None
    text_init: str | None = None
    pretrained: str | None = None
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """The data of a run, and how captions become tokens.

    Attributes:
        train: A source specification as in `open_source`, or several, which are mixed. Pre-training
            also takes one stream, see `StreamSpec`: {stream: "https://..", samples: 1000000}.
        weights: How often the samples of each source are drawn in an epoch; null: once each.
        eval: Source of the evaluation; null: no evaluation.
        validation: Source of the validation split of a downstream task, evaluated during training.
            `eval.select` selects weights by it. It must be another one than `eval`, the test split.
        zero_shot: Images for zero-shot classification as in `open_classes`:
            "emoji_classes:seed=1,size=600", or a folder with one folder of images for each class;
            null: no classification.
        tokenizer: "train" trains one on the captions of `train`; otherwise a local folder or hub
            name.
        vocab_size: Largest vocabulary of a tokenizer that the run trains.
        context_length: Number of tokens to which a caption is padded or truncated.
        captions: Caption cleaning: "plain", or the rules of "albef" or "blip", and "blip_question"
            for BLIP's VQA; null: as in the model's config.
        max_words: Number of words that these rules keep; null: as in the model's config, 30.
        resize: How evaluation images are resized: "crop" cuts out the centre, "squash" ignores the
            aspect ratio; null: as in the model's config.
        crop_scale: Lower and upper share of an image's area in a random crop; null: training images
            are resized like evaluation images.
        flip: Mirror every second image. Not for captions that contain left and right.
        randaugment: Number of operations and magnitude, up to 10, of RandAugment; null: none.
        randaugment_policy: Operations of RandAugment: those of "albef", after the crop, or those of
            "meter", on the image before it is resized.
        num_workers: Loader processes for each rank; 0 loads in the training process.
        max_bad_share: Largest share of unreadable samples before the run ends.
    """

    train: str | dict[str, Any] | tuple[str, ...]
    weights: tuple[Positive, ...] | None = None
    eval: str | None = None
    validation: str | None = None
    zero_shot: str | None = None
    tokenizer: str = "train"
    vocab_size: Size = 8192
    context_length: Size = 32
    captions: Literal["plain", "albef", "blip", "blip_question"] | None = None
    max_words: PositiveInt | None = None
    resize: Literal["crop", "squash"] | None = None
    crop_scale: tuple[Share, Share] | None = (0.9, 1.0)
    flip: bool = False
    randaugment: tuple[PositiveInt, Annotated[int, Bounds(0, 10)]] | None = None
    randaugment_policy: Literal["albef", "meter"] = "albef"
    num_workers: Workers = 0
    max_bad_share: Share = 0.05


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, and its learning rate: linear warm-up, then decay.

    Attributes:
        name: "adamw"; "lion" of timm, which needs an `lr` three to ten times lower and a
            `weight_decay` as many times higher, and has no `eps`; or "muon" of timm, which updates
            the weights of linear layers and leaves the other parameters to AdamW.
        batch_size: Images for each rank and forward pass. An optimiser step uses
            `grad_accumulation` times as many on each rank.
        grad_accumulation: Forward passes for each optimiser step.
        steps: Optimiser steps; takes precedence over `epochs`.
        epochs: Passes over the training data.
        lr: Peak learning rate.
        warmup_steps: Steps of linear warm-up, at most a fifth of the run.
        warmup_lr: Learning rate of the first step, which rises to `lr`; null: the first of
            `warmup_steps` equal parts of `lr`.
        decay: Decay after warm-up: "cosine" or "linear" to `min_lr` at the end, or "step", by
            `decay_rate` each epoch, down to `min_lr`.
        decay_each: "step", or "epoch" for a learning rate that is constant within an epoch.
        min_lr: Lowest learning rate of the decay.
        decay_rate: Factor of the decay "step".
        lr_scale: Multiples of the learning rate by pattern of parameter names, such as
            {"itm_head.*": 5}. The first pattern that matches counts.
        weight_decay: Weight decay of all parameters except those in `no_decay`.
        no_decay: Patterns of parameter names, such as "*.bias"; null: biases, norms, single vectors
            and the temperature.
        betas: The two betas of AdamW or Lion.
        eps: The epsilon of AdamW.
        max_grad_norm: Gradients are clipped to this norm; null: not clipped.
        max_nonfinite_steps: Number of steps in a row with a loss or gradient that is not finite,
            after which the run ends. Such steps are skipped.
        precision: "fp32", or autocast to "bf16" or "fp16".
        grad_checkpointing: Recompute activations in the backward pass.
        batch_slices: Number of slices in which CLIP encodes a batch, recomputed in backward.
            Gradients are those of the whole batch, memory is that of one slice.
        compile: Compile the model for training steps with torch.compile; true, or the name of a
            backend. Evaluation is not compiled.
        ema: Decay of an exponential moving average of the weights, such as 0.9999. The average is
            evaluated and saved as the model; checkpoints contain both. null: no average.
        gather: Contrast within a rank ("local") or over all ranks ("global").
        shard: Shard CLIP or METER over the ranks by FSDP2, instead of replicating the model.
    """

    batch_size: PositiveInt
    lr: Positive
    name: Literal["adamw", "lion", "muon"] = "adamw"
    steps: PositiveInt | None = None
    epochs: Positive | None = None
    grad_accumulation: PositiveInt = 1
    warmup_steps: Count = 0
    warmup_lr: NonNegative | None = None
    decay: Literal["cosine", "linear", "step"] = "cosine"
    decay_each: Literal["step", "epoch"] = "step"
    min_lr: NonNegative = 0.0
    decay_rate: PositiveShare = 0.9
    lr_scale: dict[str, Positive] = field(default_factory=dict)
    weight_decay: NonNegative = 0.1
    no_decay: tuple[str, ...] | None = None
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    eps: Positive = 1e-6
    max_grad_norm: Positive | None = 1.0
    max_nonfinite_steps: PositiveInt = 20
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_checkpointing: bool = False
    batch_slices: PositiveInt = 1
    compile: bool | Literal["inductor", "aot_eager", "eager"] = False
    ema: Rate | None = None
    gather: Literal["local", "global"] = "local"
    shard: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Which weights of a fine-tuning run are its result.

    Attributes:
        select: Metric of the task, such as "accuracy", or several, whose mean counts: the weights
            with the highest value on `data.validation` are stored in `best` and scored on
            `data.eval`, as the last ones are. null: the last weights are the result.
    """

    select: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Attributes:
        name: Name of the run in trackers and summaries.
        output_dir: Folder for checkpoints, logs and the final model.
        model: The model and its initial weights.
        data: The data and its preparation.
        optim: The optimiser and its learning rate.
        seed: Seed of initialisation, data order and augmentation.
        log_every: Steps between two rows of the log.
        eval_every: Steps between two evaluations on `data.eval` and `data.zero_shot`. 0 evaluates
            only what `report` names, at the end. With `data.validation`, steps between two
            evaluations on it; 0: once in an epoch. `data.eval` is then evaluated at the end only.
        eval: Which weights are the result.
        checkpoint_every: Steps between two checkpoints. The last step always has one.
        keep_checkpoints: Number of checkpoints to keep, the newest.
        trackers: Names of `accelerate` trackers, such as "tensorboard" or "wandb".
        report: What is reported after training. A downstream task always reports its scores and
            takes only "picture".
        task: null for pre-training, or the downstream task, a name in
            `elip_models.pretraining.tasks.registry.TASKS`. `data.train` and `data.eval` are the
            task's data.
        task_options: Options of the task, fields of its class.
        peft: Which parameters train: all, or adapters on frozen weights.
    """

    name: str
    output_dir: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    seed: Seed = 0
    log_every: PositiveInt = 10
    eval_every: Count = 0
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    trackers: tuple[str, ...] = ("tensorboard",)
    report: tuple[Literal["retrieval", "zero_shot", "timing", "picture"], ...] = ()
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    peft: AdaptConfig = field(default_factory=AdaptConfig)
