"""What a run is, as a recipe says it: frozen dataclasses, whose fields are the recipe's keys."""

from dataclasses import dataclass, field
from typing import Any, Literal

from elip_models.data.caption_rules import CaptionRule
from elip_models.data.transforms import Magnitude, ResizeMode
from elip_models.models.peft.adapt import AdaptConfig
from elip_models.validation import (
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
    """`elip_models.create_model(name, **overrides)`, and what it begins as.

    Args:
        name: as `list_models` gives them.
        overrides: fields of the model's config; the tokenizer's own follow from the data.
        vision_init: "timm:NAME", whose weights the image tower begins with; None: random.
        text_init: "hf:NAME" or "hf:FOLDER", those of the text encoder.
        pretrained: file or folder, as `elip convert` reads them, of the same family, whose weights
            the whole model begins with, instead. What is loaded, interpolated to the image size,
            copied (momentum encoders), new and left out is printed; a resumed run loads it no more.
        allow_missing: patterns of the model's names, such as "logit_bias" or "itm_head.*", that may
            stay as initialised where `pretrained` lacks them.
        allow_unexpected: patterns of names in `pretrained` that are left out; with those of
            `allow_missing`, a part that is to be new.
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
    """Where samples come from, and how captions become tokens.

    Args:
        train: source specification, as `open_source` takes it, or several, which are mixed; or, of
            pre-training, a stream, as `StreamSpec` says: {stream: "https://..", samples: 1000000}.
        weights: how often the samples of each source come in an epoch; null: once each.
        eval: source for retrieval evaluation; None evaluates nothing.
        zero_shot: images of classes for zero-shot classification, as `open_classes` takes them:
            "emoji_classes:seed=1,size=600", or a folder with a folder of images a class, such as
            ImageNet's validation images; None classifies nothing.
        tokenizer: "train" trains one on the captions of `train`; else a local folder or hub name.
        vocab_size: largest vocabulary of a tokenizer that is trained here.
        context_length: tokens a caption is padded or truncated to.
        captions: what the tokenizer reads: "plain", or by the rules of "albef" or "blip"; null: as
            the model's config says.
        resize: what evaluation shows of an image: the centre of it ("crop"), or all of it whatever
            the ratio of its sides ("squash"); null: as the model's config says.
        crop_scale: share of an image's area that a random crop shows, from and to; null shows in
            training what evaluation shows.
        flip: mirror every second image; not with captions that say left and right.
        randaugment: operations and their magnitude of 10, as ALBEF's RandAugment; null for none.
        num_workers: loader processes a rank; 0 loads in the training process.
        max_bad_share: a larger share of unreadable samples stops the run.
    """

    train: str | dict[str, Any] | tuple[str, ...]
    weights: tuple[Positive, ...] | None = None
    eval: str | None = None
    zero_shot: str | None = None
    tokenizer: str = "train"
    vocab_size: Size = 8192
    context_length: Size = 32
    captions: CaptionRule | None = None
    resize: ResizeMode | None = None
    crop_scale: tuple[Share, Share] | None = (0.9, 1.0)
    flip: bool = False
    randaugment: tuple[PositiveInt, Magnitude] | None = None
    num_workers: Workers = 0
    max_bad_share: Share = 0.05


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, linear warm-up of its learning rate, then decay.

    Args:
        name: "adamw"; "lion" of timm, whose `lr` is three to ten times lower and `weight_decay` as
            many times higher, and which has no `eps`; or "muon" of timm for the weights of linear
            layers, at the learning rates of AdamW, which takes the other parameters.
        batch_size: images a rank and a forward pass; a step sees `grad_accumulation` times as
            many on each rank.
        grad_accumulation: forward passes an optimiser step.
        steps: optimiser steps; set, it takes precedence over `epochs`.
        epochs: passes over the training data.
        lr: peak learning rate.
        warmup_steps: steps of linear warm-up, capped at a fifth of the run.
        warmup_lr: learning rate of the first step, from which it rises to `lr`; null: the first of
            `warmup_steps` equal parts of `lr`.
        decay: of the learning rate after warm-up: "cosine" or "linear" to `min_lr` at the end, or
            "step", by `decay_rate` each epoch, down to `min_lr`.
        decay_each: "step", or "epoch", whose first step says the learning rate of the others.
        lr_scale: multiples of the learning rate for parameters whose names fit a pattern, such as
            {"itm_head.*": 5}; the first that fits counts.
        weight_decay: for all parameters but those in `no_decay`.
        no_decay: patterns of names, such as "*.bias"; null: biases, norms, single vectors and the
            temperature.
        betas: AdamW's two, or Lion's.
        eps: AdamW's.
        max_grad_norm: gradients are clipped to this norm; None leaves them.
        max_nonfinite_steps: steps in a row whose loss or gradient is not finite, and which are
            skipped, before the run ends.
        precision: "fp32", or autocast to "bf16" or "fp16".
        grad_checkpointing: recompute activations in the backward pass.
        batch_slices: CLIP encodes a batch in so many slices, recomputed in backward: the gradients
            of the whole batch for the memory of one slice.
        compile: torch.compile the training step's model; true, or the name of a backend. Evaluation
            runs uncompiled.
        ema: decay of an exponential moving average of the weights, such as 0.9999, which is then
            what is evaluated and saved as the model; checkpoints hold both. null keeps none.
        gather: contrast within a rank ("local") or over all of them ("global").
        shard: shard CLIP or METER over the ranks, by FSDP2, instead of a whole model on each.
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
class RunConfig:
    """One training run.

    Args:
        name: name of the run, in trackers and summaries.
        output_dir: folder for checkpoints, logs and the final model.
        seed: of initialisation, data order and augmentation.
        log_every: steps between two rows of the log.
        eval_every: steps between two evaluations on `data.eval` and `data.zero_shot`; 0 evaluates
            at the end only, what `report` names.
        checkpoint_every: steps between two checkpoints; there is always one at the end.
        keep_checkpoints: checkpoints kept, the newest.
        trackers: names of `accelerate` trackers, such as "tensorboard" or "wandb".
        report: what follows training; of a task "picture" alone, for its scores are always there.
        task: pre-training where it is null; or the downstream task that the model is fine-tuned
            for, as `elip_models.tasks.TASKS` names it, whose data `data.train` and `data.eval` are.
        task_options: settings of the task, fields of its class.
        peft: which parameters train: all, or adapters beside weights that stay.
    """

    name: str
    output_dir: str
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    seed: Seed = 0
    log_every: PositiveInt = 10
    eval_every: Count = 0
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    trackers: tuple[str, ...] = ("tensorboard",)
    report: tuple[Literal["retrieval", "zero_shot", "timing", "picture"], ...] = ()
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    peft: AdaptConfig = field(default_factory=AdaptConfig)
