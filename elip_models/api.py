"""reduce_ and its companions for every kind of model.

image model, image-text model     `engine/install.py` replaces the forwards of its blocks
multimodal language model         `vlm/install.py` removes image tokens before or inside it, and
`engine/install.py` reduces its image tower
model of `create_model`           its own forward reduces, by the strategy in its config
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from elip_models.call_context import Record, records_of, within
from elip_models.engine import install
from elip_models.engine.reduction import Reduction
from elip_models.strategies import STRATEGIES
from elip_models.strategies.elip import Guided
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.serialization import NAMED, read_strategy
from elip_models.strategies.spec import (
    StrategyOptions,
    name_in,
    option_types,
    resolve_strategy,
)
from elip_models.strategies.strategy import StageInfo, Strategy
from elip_models.strategies.summary import Summary
from elip_models.towers import SelfReducingModel, check_module
from elip_models.user_warnings import UnguidedWarning, warn_once
from elip_models.validation import PositiveInt, as_config_error, check, shortened
from elip_models.vlm.budget import Budget, budget_of
from elip_models.vlm.call import PromptInfo
from elip_models.vlm.families import Multimodal, find_multimodal
from elip_models.vlm.install import (
    installed_strategies,
    language_strategies_in,
    language_strategy,
    prompt_hooks,
    reduce_language_model,
    refuse_language_strategy,
    uninstall_strategies,
)
from elip_models.vlm.passed_model import models_in, passed_model
from elip_models.vlm.question import Mask
from elip_models.vlm.retrieval import install_on_encoders, uninstall_from_encoders
from elip_models.vlm.stored_strategies import read_strategies, store_strategies
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import LanguageStrategy
from elip_models.vlm.summary import MultimodalSummary

AnyStrategy = Strategy | LanguageStrategy
M = TypeVar("M", bound=nn.Module)


def reduce_(
    model: M,
    strategy: str | AnyStrategy | None = None,
    keep: float | int | None = None,
    *,
    schedule: Schedule | str | None = None,
    **options: Unpack[StrategyOptions],
) -> M:
    """Make a model drop and merge image tokens, in place, and return it.

    Example::

        model = timm.create_model("vit_base_patch16_224", pretrained=True)
        elip_models.reduce_(model)                       # token merging, 70% of the tokens
        elip_models.reduce_(model, "tome", 0.5)          # another strategy, half of the tokens
        elip_models.reduce_(model, strategy="elip")      # the paper's stages, guided by a text
        print(elip_models.reduction_summary(model))      # tokens per layer, FLOPs against dense

    Parameters, state_dict keys and the call of the model do not change. A further call replaces the
    settings. Call it before torch.compile. A strategy that reads a text takes it from
    `guidance(model, text_cls)`; a whole image-text model can take it from the texts of its calls:
    `guidance(model, paired=True)`.

    Heads that read every patch, and calls that return the tokens of several blocks, get whole
    grids: each patch has its token, or that which it was merged into, or zeros if it was dropped.
    Other calls return the tokens that remain, such as `last_hidden_state` of ViTModel.

    In a multimodal language model, such as LLaVA, the strategies 'diverse', its default,
    'cdpruner', 'visionzip', 'evs', 'pool', 'stride' and 'random_tokens' remove image tokens before
    the language model, 'fastv' and 'pyramid' inside it. The others reduce its image tower. A
    strategy of each of these three places can be used at the same time. 'dedup' removes repeated
    patches before the image tower, and takes the place of one before the language model.

    Args:
        model: an image model of timm, open_clip or transformers, a whole image-text model, a
            multimodal language model of transformers, or a model of `create_model`, whose config
            stores the strategy. Of CoCa, whose text cannot guide its images, the image tower alone
            is reduced.
        strategy: a name in `elip_models.STRATEGIES`, a line such as 'evit:keep_ratio=0.6', a file
            of `calibrate` such as 'best.json', or an instance. None means: for an image model
            'merge' at keep=0.7, or, with a warning, 'elip' or 'random' if other code has replaced
            the forward of a block; for a language model 'diverse' at keep=0.5; for a saved
            transformers model what its config stores; for a model of `create_model` its own ELIP,
            or ELIP with the paper's schedule.
        keep: the target: the mean share of tokens over the layers, a float in (0, 1], in place of
            the strategy's own option (`schedule`, `r`, `keep_ratio`, `size`). Without both, a named
            strategy keeps 0.7. For a language model, a float is the share of each image's tokens,
            1.0 for all, and an int is their number.
        schedule: stages as text, '2(100%) 2(90%) 6(65%) 2(40%)', whose layers add up to the model's
            depth; or a preset, 'clip', 'albef', 'blip' or 'meter', which is scaled to that depth.
            Without `strategy` it selects ELIP.
        options: options of the strategy, such as `r` of ToMe; they need `strategy` or `schedule`.

    Raises:
        TypeError: the model cannot be reduced, is compiled, or an argument has a wrong type.
        ValueError: a wrong value, an option that the strategy does not have, or two arguments that
            set the number of tokens.
        RuntimeError: a call with other settings inside `guidance`, `budget` or `record_stages`.
    """
    options = {"schedule": schedule, **options}
    check_module(model, strategy, "reduce_")
    install.refuse_compiled(model, "reduce_")
    if isinstance(keep, str) and not isinstance(strategy, str | AnyStrategy | None):
        raise TypeError(
            f"strategy: expected a name or a Strategy, got {shortened(strategy)}, with "
            f"keep={shortened(keep)}; pass keep as the third argument"
        )
    multimodal = find_multimodal(passed_model(model))
    if multimodal is None and not _is_for_tower(strategy, options):
        refuse_language_strategy(model, strategy)
    if isinstance(model, SelfReducingModel):
        default = model.elip_strategy
        chosen = resolve_strategy(model.tower, strategy, options, keep=keep, default=default)
        if chosen != model.reduction:
            install.refuse_in_use(bool(records_of(model.tower)))
            model.set_reduction(chosen)
        return model
    if multimodal is None:
        return install.install_strategy(model, strategy, options, keep)
    _reduce(passed_model(model), multimodal, strategy, keep, options)
    install_on_encoders(model)
    return model


def unreduce_(model: M) -> M:
    """Undo `reduce_`, also on a deepcopied or unpickled model, and return the model.

    Pass a whole image-text model or just its image tower. `unreduce_` restores the image tower of a
    multimodal language model, too.

    Args:
        model: a model that `reduce_` may have changed.

    Raises:
        TypeError: the model is compiled, or a forward method was wrapped after `reduce_`.
    """
    install.refuse_compiled(model, "unreduce_")
    passed = passed_model(model)
    if isinstance(passed, SelfReducingModel):
        if passed.is_reduced:
            passed.set_reduction(None)
        return model
    install.uninstall_strategy(passed)
    uninstall_from_encoders(model)
    if (multimodal := find_multimodal(passed)) is not None:
        uninstall_strategies(multimodal)
    return model


def reduction_summary(model: nn.Module) -> Summary | MultimodalSummary:
    """Return how the model is reduced: strategy, tokens per layer, FLOPs against dense, guidance.

        print(elip_models.reduction_summary(model))

    Args:
        model: a reduced model, or one that could be reduced, whose summary is the dense tower's. Of
            a multimodal language model, the figures of tower and language model stand apart.

    Raises:
        TypeError: the model cannot be reduced, with the reason.
    """
    model = passed_model(model) if isinstance(model, nn.Module) else model
    if isinstance(model, SelfReducingModel):
        return Summary.of(model.tower, model.reduction, is_whole=True)
    multimodal = find_multimodal(model)
    if multimodal is None:
        return install.tower_summary(model)
    reduction = install.reduction_of(multimodal.tower)
    tower = None if reduction is None else reduction.summary
    hooks = prompt_hooks(multimodal)
    inside = None if hooks is None else budget_of(hooks)
    return MultimodalSummary.of(multimodal, *installed_strategies(multimodal), tower, inside)


def is_reduced(model: nn.Module) -> bool:
    """Return whether `reduce_` has changed the model, or the one inside a wrapper."""
    return isinstance(model, nn.Module) and bool(strategies_in(model))


def strategies_in(model: nn.Module) -> tuple[AnyStrategy, ...]:
    """Return the strategies that reduce the model: each, passed to `reduce_`, is set again."""
    if not any(map(_strategies_of, models_in(model).values())):
        return ()
    return _strategies_of(passed_model(model))


def _strategies_of(model: nn.Module) -> tuple[AnyStrategy, ...]:
    if isinstance(model, SelfReducingModel):
        return (model.reduction,) if model.is_reduced else ()
    reduction = install.reduction_of(model)
    of_tower = () if reduction is None else (reduction.strategy,)
    return (*of_tower, *language_strategies_in(model))


@contextmanager
def guidance(
    model: nn.Module,
    text_cls: Tensor | None = None,
    *,
    paired: bool = False,
    question: Tensor | None = None,
) -> Iterator[None]:
    """Guide a reduced model by a text in the forward passes inside.

        with elip_models.guidance(model, text_cls):
            features = model(images)
        with elip_models.guidance(model, paired=True):      # of a whole image-text model
            outputs = model(images, texts)                  # text i guides image i
        with elip_models.guidance(model, question=mask):    # of a multimodal language model
            logits = model(**inputs).logits

    The guidance applies to the thread or asyncio task that enters it; others may run the same model
    with their own. One thread or task at a time can guide a compiled model. The backward pass may
    run after the context has ended.

    Args:
        model: a model that `reduce_` has changed; DistributedDataParallel or torch.compile may wrap
            it.
        text_cls: (B, D), one vector per image in the tower's width D, or (1, D) for all images. It
            is detached.
        paired: text i of a whole image-text model's own call guides image i, or its only text all
            images; another number of texts raises ValueError. Without it the texts of a call guide
            no image, unless the call itself is about pairs: with return_loss=True (CLIPModel,
            SiglipModel) or the ITM head (BlipForImageTextRetrieval).
        question: (B, N) bool, the tokens of each prompt of a multimodal language model by which
            strategies that read the question select image tokens. Tokens behind the first N are
            none of it. Labels have precedence. Without both, all text is the question, except
            what `logits_to_keep` predicts.

    Raises:
        TypeError, ValueError: a model that `reduce_` has not changed, `text_cls` not (B, D), or
            `question` not (B, N) with a token in each row, or without values; `paired` beside
            `text_cls`, or of a model that takes no texts; none of them.
    """
    check_module(model, text_cls, "guidance")
    model = passed_model(model)
    if isinstance(model, SelfReducingModel):
        raise TypeError(
            f"model: expected one that reduce_ has changed, got a {type(model).__name__}, whose "
            "forward takes its texts; pass them with the images"
        )
    check("paired", paired, bool)
    asked = nullcontext() if question is None else within(_question_of(model, question))
    if text_cls is None and question is not None and not paired:
        with asked:
            yield
        return
    reduction = _tower_reduction(model)
    if paired:
        _check_paired(reduction, text_cls)
        _warn_if_unread(reduction.strategy)
        with asked, reduction.paired():
            yield
        return
    if not isinstance(text_cls, Tensor) or not text_cls.is_floating_point():
        raise TypeError(f"text_cls: expected a floating-point tensor (B, D), got {text_cls!r:.80}")
    width = reduction.tower.width
    if text_cls.dim() != 2 or text_cls.shape[1] != width:
        raise ValueError(
            f"text_cls: expected (B, {width}), the tower's width, or (1, {width}) for all "
            f"images, got {tuple(text_cls.shape)}; "
            "project it to the tower's width first"
        )
    _warn_if_unread(reduction.strategy)
    with asked, reduction.guided(text_cls.detach().clone()):
        yield


def _check_paired(reduction: Reduction, text_cls: Tensor | None) -> None:
    """Raise ValueError if the model's own calls have no texts that could guide its images."""
    if text_cls is not None:
        raise ValueError("paired: expected False beside `text_cls`, got True; pass one of them")
    if reduction.image_text is None:
        raise ValueError(
            "paired: expected an image-text model that reduce_ has changed as a whole, got an "
            f"image tower of {type(reduction.model).__name__}; pass text_cls"
        )


def _warn_if_unread(strategy: Strategy) -> None:
    """Warn once if the strategy reads no text."""
    if strategy.is_guided:
        return
    message = f"{strategy.name!r} reads no text; 'elip' and 'guided_tome' do"
    if isinstance(strategy, Guided):
        reason = f"fusion={strategy.fusion:g}"
        reason = reason if strategy.uses_query else f"scorer={strategy.scorer!r}"
        message = f"{strategy.name!r} reads no text with {reason}"
    warn_once(message, UnguidedWarning, stacklevel=5)


@contextmanager
def budget(
    model: nn.Module,
    keep: float | int | Sequence[float | int] | None = None,
    *,
    total: int | None = None,
) -> Iterator[None]:
    """Set how many image tokens a multimodal language model keeps in the calls inside.

        with elip_models.budget(model, 256):              # of each image
            model.generate(**inputs)
        with elip_models.budget(model, total=1024):       # of all images and tiles of a prompt
            model.generate(**inputs)

    It replaces the `keep` of the strategy before the language model; without one, of that inside
    it. It applies to the thread or asyncio task that enters it.

    Args:
        model: a multimodal language model whose image tokens `reduce_` removes.
        keep: as of `reduce_`; or one for each image of the batch, in the order of the prompts.
        total: the tokens of all images of a prompt together, in proportion to their own. A strategy
            inside the language model leaves as many behind its last drop.

    Raises:
        TypeError, ValueError: a model without such a strategy, a wrong value, or both arguments.
            The forward pass raises ValueError for a budget that does not fit the prompt.
    """
    check_module(model, keep, "budget")
    model = passed_model(model)
    strategies, multimodal = language_strategies_in(model), find_multimodal(model)
    if not strategies:
        raise ValueError(
            "model: expected a multimodal language model whose image tokens reduce_ removes, got a "
            f"{type(model).__name__}; call reduce_ with such a strategy first"
        )
    if (keep is None) == (total is None):
        raise ValueError(
            f"keep: expected either `keep` or `total`, got keep={keep} and total={total}; pass one"
        )
    strategy = next((own for own in strategies if own.keep is not None), None)
    if strategy is None:
        raise ValueError(
            f"keep: expected none under {strategies[0].name!r}, which removes what an image "
            f"repeats, got keep={keep} and total={total}; set its tolerance, or add 'fastv'"
        )
    keeps = keep if isinstance(keep, Sequence) and not isinstance(keep, str) else [keep]
    if total is not None:
        total = check("total", total, PositiveInt)
    else:
        keeps = [replace(strategy, keep=value).keep for value in keeps]  # checks it
    own = tuple(keeps) if isinstance(keep, Sequence) else keeps[0]
    with within(Budget(prompt_hooks(multimodal), own, total)):
        yield


def _question_of(model: nn.Module, question: Tensor) -> Mask:
    """Return the mask of the hooks that read the question, with a copy of its tokens."""
    multimodal = find_multimodal(model)
    hooks = None if multimodal is None else prompt_hooks(multimodal)
    if hooks is None:
        raise ValueError(
            "model: expected a multimodal language model whose image tokens reduce_ removes, for "
            f"`question`, got a {type(model).__name__}; call reduce_ with such a strategy first"
        )
    is_mask = isinstance(question, Tensor) and question.dtype == torch.bool
    if not is_mask or question.dim() != 2:
        got = f"{question.dtype} {tuple(question.shape)}" if isinstance(question, Tensor) else ""
        raise TypeError(
            f"question: expected a bool tensor (B, N), got {got or type(question).__name__}; pass "
            "True for each token of the question"
        )
    if question.is_meta or question.numel() == 0:
        got = "one on the device meta" if question.is_meta else f"shape {tuple(question.shape)}"
        raise ValueError(
            "question: expected a tensor with the values of at least one row and one token, got "
            f"{got}; pass the mask of the call's prompts on the CPU or a GPU"
        )
    if not question.any(1).all():
        raise ValueError(
            "question: expected a token in each row, got a row without; mark a token of its text"
        )
    if not any(strategy.reads_question for strategy in language_strategies_in(model)):
        names = ", ".join(repr(strategy.name) for strategy in language_strategies_in(model))
        warn_once(f"{names} reads no question", UnguidedWarning, stacklevel=5)
    return Mask(hooks, question.clone())


def _tower_reduction(model: nn.Module) -> Reduction:
    """Return the reduction of the model's image tower; raise ValueError if there is none."""
    reduction = install.reduction_of(model) if isinstance(model, nn.Module) else None
    if reduction is not None:
        return reduction
    strategies = language_strategies_in(model)
    if not strategies:
        raise ValueError("model: expected one that reduce_ has changed, got one without reduction")
    raise ValueError(
        "model: expected one whose image tower reduce_ has changed, got a "
        f"{type(model).__name__} with {strategies[0].name!r}, which acts on the language model "
        "and reads the question in the prompt itself; call the model without guidance, or "
        "pass `question`, a mask of its tokens"
    )


@contextmanager
def record_stages(model: nn.Module) -> Iterator[list[StageInfo] | list[PromptInfo]]:
    """Record what a reduced model keeps and merges in the forward passes inside.

        with elip_models.record_stages(model) as infos:
            model(images)
        infos[-1].reduction.kept          # (B, K) indices into the tokens before the last stage

    It records the forward passes of the thread or asyncio task that enters it, without those that
    activation checkpointing recomputes. `encode_image` returns its own with return_info=True.

    Args:
        model: a model that `reduce_` has changed.

    Yields:
        A list that receives one `StageInfo` per stage, forward pass after forward pass. For a
        language model that reads fewer image tokens, one `PromptInfo` per forward pass.

    Raises:
        TypeError: a compiled model, whose graph cannot be recorded.
        ValueError: a model that `reduce_` has not changed.
    """
    install.refuse_compiled(model, "record_stages")
    infos: list[Any] = []
    with within(Record(_recorded(passed_model(model)), infos)):
        yield infos


def _recorded(model: nn.Module) -> object:
    """Return the object that makes the records of a reduced model."""
    if isinstance(model, SelfReducingModel) and model.is_reduced:
        return model.tower
    multimodal = find_multimodal(model)
    hooks = None if multimodal is None else prompt_hooks(multimodal)
    return _tower_reduction(model) if hooks is None else hooks


def _reduce(
    model: nn.Module, multimodal: Multimodal, strategy: Any, keep: Any, options: dict[str, Any]
) -> None:
    """Reduce the image tower or the language model, and store all strategies in the config."""
    if isinstance(strategy, str) and strategy.endswith(".json"):
        strategy = read_strategy(strategy, NAMED | LANGUAGE_STRATEGIES)
    is_saved = getattr(multimodal.config, "elip", None) is not None
    if _is_for_tower(strategy, options):
        install.install_strategy(model, strategy, options, keep)
    elif strategy is None and keep is None and is_saved and not is_reduced(model):
        with as_config_error(f"{type(multimodal.config).__name__}.elip"):
            restore_(model, multimodal.config.elip)
    else:
        reduce_language_model(multimodal, language_strategy(strategy, {"keep": keep, **options}))
    reduction = install.reduction_of(multimodal.tower)
    of_tower = None if reduction is None else reduction.strategy
    store_strategies(model, multimodal.config, of_tower, language_strategies_in(model))


def restore_(model: nn.Module, saved: Any) -> None:
    """Reduce a multimodal language model by the settings that a config stores."""
    of_tower, of_language_model = read_strategies(saved)
    for strategy in (of_tower, *of_language_model):
        if strategy is not None:
            reduce_(model, strategy)


def _is_for_tower(strategy: Any, options: dict[str, Any]) -> bool:
    """Return whether the arguments name a strategy of image towers, or an option of one."""
    if isinstance(strategy, str):
        return strategy.endswith(".json") or name_in(strategy) in STRATEGIES
    if strategy is None:
        known = {option for name in STRATEGIES for option in option_types(name)}
        return any(name in known for name, value in options.items() if value is not None)
    return isinstance(strategy, Strategy)
