"""reduce_, unreduce_, guidance: token reduction for a model somebody else owns.

`reduce_` puts an object in place of the forward of each block from the first that a strategy acts
at (`stand_ins.py`): parameters and state_dict keys stay. All of them share one state (`state.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack

import torch
from torch import Tensor, nn

from elip_models.reduction.block_patches import (
    REFUSALS,
    Entrance,
    ReducedBlock,
    Refusal,
    Representation,
    TextFirst,
)
from elip_models.reduction.caching import UnguidedWarning, warn_once
from elip_models.reduction.dense_outputs import DenseMethod, HiddenStates
from elip_models.reduction.hf_config import remove_from_config, store_in_config, strategy_in_config
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.state import Reduction, is_in_use, recording
from elip_models.reduction.strategies import default_strategy
from elip_models.reduction.strategies.elip import ELIP, ELIPOptions, Guided
from elip_models.reduction.strategy import StageInfo, Strategy
from elip_models.reduction.strategy_spec import get_strategy
from elip_models.reduction.summary import Summary
from elip_models.towers import ImageTextModel, Tower, as_image_text, as_tower

M = TypeVar("M", bound=nn.Module)
StandIn = (ReducedBlock, Entrance, Refusal, Representation, DenseMethod)
KNOWING = (ReducedBlock, Entrance, Representation)  # a Reduction
Hook = TextFirst | HiddenStates


def reduce_(
    model: M,
    *,
    keep: float | None = None,
    schedule: Schedule | str | None = None,
    strategy: str | Strategy | None = None,
    **options: Unpack[ELIPOptions],
) -> M:
    """Make an image model drop and merge tokens, in place; returns the model.

        model = timm.create_model("vit_base_patch16_224", pretrained=True)
        elip_models.reduce_(model)                          # ToMe, to 70% of the tokens
        elip_models.reduce_(model, keep=0.5)                # to half of them, mean over layers
        elip_models.reduce_(model, strategy="elip")         # the paper's: a text guides, in stages
        elip_models.reduce_(model, schedule="2(100%) 10(50%)", scorer="exact")
        print(elip_models.reduction_summary(model))         # tokens a layer, FLOPs against dense
        elip_models.unreduce_(model)                        # the untouched model again

    Parameters, state_dict keys and the call stay the same. A further call replaces the settings, in
    some ten milliseconds. Ratios are of the patches of each image, whatever its size. Calls for the
    tokens of several blocks (forward_intermediates, output_hidden_states=True) give whole grids: a
    merged token wherever its patches were, zeros for what was dropped without merging. Call it
    before torch.compile, which does not see what comes later. Guidance, of a strategy that reads a
    text, comes by `with guidance(model, text_cls):` around the forward. A whole language-image
    model then guides itself: its forward encodes the text first, without gradient. Image i is
    guided by text i, every image by a single text, else by itself.

    Args:
        model: an image model of timm, open_clip or transformers, or a whole language-image model;
            CoCa, whose text cannot guide its images, is reduced as its image tower alone.
        keep: the mean share of tokens over the layers, in (0, 1], that the strategy is set to, for
            every strategy; None leaves it as its settings or its schedule say.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)', whose layers add up to the model's depth; or a
            preset of the paper's models, 'clip' (the default), 'albef', 'blip' or 'meter', scaled
            to that depth.
        strategy: a name in `elip_models.STRATEGIES`, or a line such as 'evit:keep_ratio=0.6', or an
            instance, which then holds all options; by default 'elip' where there is a schedule or
            an option, else 'tome' at 0.7 of the tokens, where it can be (`default_strategy`). With
            no argument at all, a saved model of transformers is reduced as its `config.elip` says.
        options: scorer ('last' by default, 'exact', 'cls', 'official', or a number), fusion (0.8),
            guidance_norm ('none'), without_text ('vision'; 'dense' of a tower without CLS), merge
            (True) and proportional (False), see `ELIPOptions`.

    Raises:
        TypeError, ValueError: a model that cannot be reduced or is compiled; a bad argument.
        RuntimeError: other settings inside `guidance` or `record_stages`, which hold those before.
    """
    _refuse_compiled(model, "reduce_")
    (image_text, tower), others = _read(model), reductions_of(model)
    if strategy is None:
        is_saved = keep is None and not others
        named = schedule is not None or options
        strategy = ELIP.name if named else _unnamed_strategy(image_text, tower, is_saved)
    strategy = get_strategy(strategy, schedule=schedule, **options).fitted(tower)
    if keep is not None:
        strategy = strategy.at_keep(tower, keep)
    reduction = Reduction(tower, strategy, _guiding(image_text, strategy, tower))
    if not any(_are_alike(reduction, other) for other in others):
        _install(model, reduction)  # else not even a compiler that has seen it sees a change
    return model


def _guiding(
    image_text: ImageTextModel | None, strategy: Strategy, tower: Tower
) -> ImageTextModel | None:
    """The whole model, if its text can guide its images; raises where nothing else could."""
    reason = None if image_text is None else image_text.refuses()
    if reason is None:
        return image_text
    if strategy.is_guided and not tower.has_cls:
        raise TypeError(
            "model: expected one whose text can guide its images, got "
            f"{type(image_text.model).__name__}: {reason}"
        )
    return None


def _read(model: nn.Module) -> tuple[ImageTextModel | None, Tower]:
    """The whole image-text model, if it is one, and the tower of its image model."""
    image_text = as_image_text(model)
    return image_text, as_tower(model if image_text is None else image_text.image_model)


def _unnamed_strategy(image_text: ImageTextModel | None, tower: Tower, is_saved: bool) -> Strategy:
    """What the model was saved with, if that may count; or else the default by what it is."""
    has_text = image_text is not None and image_text.refuses() is None
    saved = strategy_in_config(image_text or tower) if is_saved else None
    is_free = all(_replaced(block, "forward") is None for block in tower.blocks)
    return saved or default_strategy(tower, has_text=has_text, replaces_block=is_free)


def _are_alike(one: Reduction, other: Reduction) -> bool:
    are_whole = [each.image_text is not None for each in (one, other)]
    return one.strategy == other.strategy and are_whole[0] == are_whole[1]


def _refuse_replaced(reduction: Reduction) -> None:
    """A forward that somebody has replaced would be bypassed."""
    tower, strategy = reduction.tower, reduction.strategy
    owners = [(tower.blocks[i], "forward") for i in reduction.acts_at if strategy.replaces_block]
    owners += tower.entrance if strategy.changes_embedding else []
    for owner, name in owners:
        if _replaced(owner, name) is not None:
            raise TypeError(
                f"model: expected {type(owner).__name__}s that run their own {name}, got one whose "
                f"{name} was replaced, which {strategy.name!r} would bypass"
            )


def _replaced(owner: nn.Module, name: str) -> Any:
    """What somebody else has put in place of a method, or None."""
    found = vars(owner).get(name)
    found = found.replaced if isinstance(found, ReducedBlock) else found
    return None if isinstance(found, Entrance) else found


def _install(model: nn.Module, reduction: Reduction) -> None:
    _refuse_replaced(reduction)
    if any(is_in_use(each) for each in reductions_of(model)):
        raise RuntimeError(
            "reduce_: expected a call outside of guidance(model, ..) and record_stages(model), "
            "which hold what the model was reduced by before, got one inside; leave them first"
        )
    unreduce_(model)
    tower, strategy, image_text = reduction.tower, reduction.strategy, reduction.image_text
    shown = reduction.model
    shown.extra_repr = Representation(reduction, vars(shown).get("extra_repr"))
    store_in_config(model, reduction)
    if not reduction.acts_at and not strategy.changes_embedding:
        return
    if strategy.changes_embedding:
        *first, (owner, name) = tower.entrance
        setattr(owner, name, Entrance(reduction, passes_on=False))
        for owner, name in first:
            setattr(owner, name, Entrance(reduction, passes_on=True))
    for i, block in enumerate(tower.blocks):
        if i >= reduction.first:
            block.forward = ReducedBlock(reduction, i, vars(block).get("forward"))
    _install_methods(reduction)
    if tower.collector is not None:
        _hook(tower.collector, HiddenStates(reduction))
    if image_text is not None and strategy.is_guided:
        _hook(image_text.model, TextFirst(reduction))


def _install_methods(reduction: Reduction) -> None:
    """In place of those of the model that read more of it than its own forward does."""
    model, tower = reduction.tower.model, reduction.tower
    refused, dense = [*tower.unsupported_methods, *REFUSALS], tower.dense_methods
    if reduction.strategy.changes_embedding:
        refused, dense = [*refused, *dense], ()
    for name in refused:
        setattr(model, name, Refusal(name, vars(model).get(name)))
    for name in dense:
        setattr(model, name, DenseMethod(reduction, name, vars(model).get(name)))


def _hook(module: nn.Module, hook: Hook) -> None:
    """Around the module's forward."""
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_forward_hook(hook, with_kwargs=True, always_call=True)


def _unhook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Hook):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, Hook):
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def unreduce_(model: M) -> M:
    """Undo `reduce_`, also on a deepcopied or unpickled model; returns the model.

    Of the image model inside a whole one that was reduced, the whole one is undone.
    """
    _refuse_compiled(model, "unreduce_")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, ReducedBlock) and name != "forward":
                raise TypeError(
                    f"model: expected {type(module).__name__}s as reduce_ left them, got one whose "
                    "forward was wrapped since; take that off first"
                )
    reductions = reductions_of(model)
    wholes = (model, *(reduction.model for reduction in reductions))
    modules = list(dict.fromkeys(module for whole in wholes for module in whole.modules()))
    remove_from_config(modules, reductions)
    for module in modules:
        _unhook(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, StandIn):
                delattr(module, name)
                if not isinstance(value, Entrance) and value.replaced is not None:
                    setattr(module, name, value.replaced)
    return model


def reduction_summary(model: nn.Module) -> Summary:
    """How the model is reduced now: strategy, tokens a layer, FLOPs against dense, what guides it.

    Of a model that `reduce_` has not changed, the dense tower's.

    Raises:
        TypeError: a model that cannot be reduced, with the reason.
    """
    found = reductions_of(model) if isinstance(model, nn.Module) else []
    if found:
        return found[0].summary
    image_text, tower = _read(model)
    return Summary.of(tower, None, is_whole=image_text is not None)


def is_reduced(model: nn.Module) -> bool:
    """Whether `reduce_` has changed the model, or one inside it."""
    return isinstance(model, nn.Module) and bool(reductions_of(model))


def is_reduced_tower(tower: Tower) -> bool:
    """`is_reduced` of the tower's own parts alone, which every forward can afford."""
    entrance = [] if tower.refuses_resizing() else tower.entrance
    owners = [*entrance, *((block, "forward") for block in tower.blocks)]
    return any(isinstance(vars(owner).get(name), StandIn) for owner, name in owners)


@contextmanager
def record_stages(model: nn.Module) -> Iterator[list[StageInfo]]:
    """What the steps of the reduced `model` do in the forwards inside, one `StageInfo` each.

        with elip_models.record_stages(model) as infos:
            model(images)
        infos[-1].reduction.kept          # (B, K) where the tokens stood before the last step

    They come in the order of the steps, forward after forward; of the thread or asyncio task that
    enters, without those that a checkpoint recomputes. What `encode_image` does, it returns itself.

    Raises:
        TypeError: a compiled model, whose graph tells nothing.
        ValueError: a model that `reduce_` has not changed.
    """
    _refuse_compiled(model, "record_stages")
    infos: list[StageInfo] = []
    with recording(_reduced(model), infos):
        yield infos


@contextmanager
def guidance(model: nn.Module, text_cls: Tensor) -> Iterator[None]:
    """Guide the reduced `model` by `text_cls` (B, D) in the forwards inside; detached. One text
    (1, D) guides all images.

    The guidance is that of the thread or asyncio task which enters it: others, each with its own,
    may run the same model. `model` may be wrapped by DistributedDataParallel or torch.compile; a
    compiled model is guided by one thread or task at a time, and another's call is an error.
    Backward may run after the context has ended.

    Raises:
        TypeError, ValueError: a model that `reduce_` has not changed, or text_cls not (B, D).
    """
    reductions = _reduced(model)
    if not isinstance(text_cls, Tensor) or not text_cls.is_floating_point():
        raise TypeError(f"text_cls: expected a floating-point tensor (B, D), got {text_cls!r:.80}")
    for width in (reduction.tower.width for reduction in reductions):
        if text_cls.dim() != 2 or text_cls.shape[1] != width:
            raise ValueError(
                f"text_cls: expected (B, {width}), the tower's width, or (1, {width}) for all "
                f"images, got {tuple(text_cls.shape)}; "
                "project it to the tower's width first"
            )
    for strategy in (each.strategy for each in reductions if not each.strategy.is_guided):
        said = f"{strategy.name!r} reads no text, so none guides it: 'elip' and 'guided_tome' do"
        if isinstance(strategy, Guided):
            how = f"where fusion is {strategy.fusion:g}"
            how = how if strategy.uses_query else f"by scorer={strategy.scorer!r}"
            said = f"{strategy.name!r} reads no text {how}"
        warn_once(said, UnguidedWarning, stacklevel=4)
    text_cls, this = text_cls.detach().clone(), object()
    for reduction in reductions:
        reduction.guide(this, text_cls)
    try:
        yield
    finally:
        for reduction in reductions:
            reduction.unguide(this)


def reductions_of(model: nn.Module) -> list[Reduction]:
    """What has changed the model, or one inside it."""
    stand_ins = (value for module in model.modules() for value in vars(module).values())
    found = (each.reduction for each in stand_ins if isinstance(each, KNOWING))
    return list({id(reduction): reduction for reduction in found}.values())


def _reduced(model: nn.Module) -> list[Reduction]:
    """`reductions_of` of a model that has some."""
    reductions = reductions_of(model) if isinstance(model, nn.Module) else []
    if not reductions:
        raise ValueError("model: expected one that reduce_ has changed, got one without reduction")
    return reductions


def _refuse_compiled(model: nn.Module, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError(
            f"model: expected a model before torch.compile, got a compiled one; call {name} first, "
            "then compile"
        )
