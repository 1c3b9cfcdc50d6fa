"""The place between the image features and the language model, where image tokens are removed.

Four hooks of stock modules do it. The multimodal model notes which tokens of its input are images.
Before the language model runs, a strategy selects image tokens, and the others are removed from the
embeddings, positions and masks; the tokens that remain keep their positions. After it, the hidden
states return to the whole length, with zeros for removed tokens, so that labels and logits hold.

A removed token is like one that no other token may attend to, which the tests compare with. The
last token of each image stays, because the token behind it is predicted from it.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elip_models.vlm.cache_state import CacheState, enter, leave, state_of
from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import Packing, gather_columns, hide
from elip_models.vlm.strategies.base import ImageTokenStrategy

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument


class PromptInfo(NamedTuple):
    """The tokens of one forward pass of a reduced multimodal language model.

    Attributes:
        images: (B, N) bool, the image tokens of the prompt.
        kept: (B, N) bool, the tokens that the language model reads.
        cached: the tokens of each sequence in its key-value cache afterwards, 0 without a cache.
    """

    images: Tensor
    kept: Tensor
    cached: int


@dataclass
class _Call:
    """One forward pass of the multimodal model."""

    images: Tensor | None  # (B, N) bool
    kept: Tensor | None = None
    packing: Packing | None = None
    state: CacheState | None = None
    token: Token | None = field(default=None, repr=False)


CALLS: ContextVar[tuple[_Call, ...]] = ContextVar("CALLS", default=())
RECORDS: ContextVar[tuple[tuple[object, list[PromptInfo]], ...]] = ContextVar("RECORDS", default=())


class Seam:
    """The hooks that reduce one multimodal language model, and the strategy they use."""

    def __init__(self, multimodal: Multimodal, strategy: ImageTokenStrategy) -> None:
        self.strategy = strategy
        self.placeholder_ids = multimodal.placeholder_ids
        self.window = multimodal.window

    def install(self, multimodal: Multimodal) -> None:
        """Register the hooks."""
        model, language_model = multimodal.model, multimodal.language_model
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.register_forward_hook(self.end, with_kwargs=True, always_call=True)
        language_model.register_forward_pre_hook(self.remove, with_kwargs=True)
        language_model.register_forward_hook(self.restore, with_kwargs=True)
        model.extra_repr = SeamText(self, model, vars(model).get("extra_repr"))

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the image tokens of a forward pass of the multimodal model."""
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        _refuse_packed(kwargs)
        if ids is not None:
            images = _any_equal(ids, self.placeholder_ids)
        elif embeds is not None:  # generate passes embeddings instead
            table = model.get_input_embeddings().weight
            rows = (table[i] for i in self.placeholder_ids)
            images = torch.stack([(embeds == row).all(-1) for row in rows]).any(0)
        else:
            images = None
        call = _Call(images)
        call.token = CALLS.set((*CALLS.get(), call))

    def end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Forget the forward pass."""
        if calls := CALLS.get():
            CALLS.reset(calls[-1].token)

    def remove(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Remove tokens from what the language model reads."""
        call = _current()
        embeds = kwargs.get("inputs_embeds")
        if call is None or call.images is None or embeds is None:
            return None
        cache = _cache_in(kwargs)
        past = state_of(cache)
        selected = self._select(embeds, call.images)
        if selected is None and past is None:
            return None
        self._check(embeds, cache, past)
        if cache is not None:
            enter(cache)
        if selected is None:
            kept = torch.ones_like(call.images)
        else:
            embeds, kept = selected
        cached = 0 if cache is None else cache.get_seq_length()
        past = past or CacheState.whole(len(embeds), cached, embeds.device)
        call.kept, call.packing = kept, Packing.of(kept)
        call.state = past.extended(call.packing.order, call.packing.real, kept.shape[1])
        return args, _without_removed(kwargs, embeds, call.packing, past)

    def restore(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return hidden states to the length of the whole sequence."""
        call = _current()
        if call is None or call.packing is None:
            return None
        cache = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
        if cache is not None:
            leave(cache, call.state)
        infos = [infos for owner, infos in RECORDS.get() if owner is self]
        for each in infos:
            width = 0 if cache is None else call.state.columns.shape[1]
            each.append(PromptInfo(call.images, call.kept, width))
        scatter = call.packing.scatter
        output["last_hidden_state"] = scatter(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(scatter(each) for each in output["hidden_states"])
        return output

    def _select(self, embeds: Tensor, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return embeddings and (B, N) bool, the tokens to keep; None to keep all."""
        kept = torch.ones_like(images)
        is_shorter = False
        for rows, positions in _runs_by_length(images):
            count = self.strategy.count(positions.shape[1])
            if count == positions.shape[1]:
                continue
            is_shorter = True
            question = _question(embeds, images, rows) if self.strategy.reads_question else None
            tokens = embeds[rows, positions]
            chosen, values = self.strategy.reduce(tokens, count, question)
            kept[rows, positions] = False
            positions = positions.gather(1, chosen)
            kept[rows, positions] = True
            if values is not None:
                embeds = embeds.index_put((rows, positions), values.to(embeds.dtype))
        return (embeds, kept) if is_shorter else None

    def _check(self, embeds: Tensor, cache: Any, past: CacheState | None) -> None:
        """Raise an error for a call whose result would not be that of the tokens that stay."""
        length = embeds.shape[1] + (past.length if past else 0)
        if self.window is not None and length > self.window:
            raise ValueError(
                f"input_ids: expected at most {self.window} tokens, the window of the language "
                f"model's attention, since it counts the removed ones too, got {length}; call "
                "unreduce_ for longer prompts"
            )
        if getattr(cache, "is_compileable", False):
            raise TypeError(
                f"cache: expected a dynamic cache, got {type(cache).__name__}, whose length is "
                "fixed; call generate without cache_implementation"
            )


class SeamText:
    """A replacement of a model's `extra_repr`, which prints the reduction too."""

    def __init__(self, seam: Seam, model: nn.Module, replaced: Callable[[], str] | None) -> None:
        self.seam = seam
        self.model = model
        self.replaced = replaced

    def __call__(self) -> str:
        """Return the model's own text, and the reduction in one line."""
        own = (self.replaced or partial(type(self.model).extra_repr, self.model))()
        return "\n".join(filter(None, (own, f"(reduced) image tokens: {self.seam.strategy}")))


def _without_removed(
    kwargs: dict[str, Any], embeds: Tensor, packing: Packing, past: CacheState
) -> dict[str, Any]:
    """Return the arguments of the language model for the tokens that remain."""
    new = kwargs | {"inputs_embeds": packing.rows(embeds)}
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None] + past.length
    new["position_ids"] = packing.positions(positions)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        new["attention_mask"] = {key: _mask(each, packing, past) for key, each in mask.items()}
    else:
        new["attention_mask"] = _mask(mask, packing, past)
    if kwargs.get("cache_position") is not None:
        held = past.columns.shape[1]
        new["cache_position"] = torch.arange(packing.order.shape[1], device=embeds.device) + held
    if kwargs.get("visual_pos_masks") is not None:  # Qwen3-VL adds features in its first layers
        visual = kwargs["visual_pos_masks"]
        visual = visual[..., 0] if visual.dim() == 3 else visual
        stays = torch.zeros_like(visual).scatter(1, packing.order, packing.real)[visual]
        new["visual_pos_masks"] = packing.rows(visual) & packing.real
        features = kwargs["deepstack_visual_embeds"]
        new["deepstack_visual_embeds"] = [each[stays] for each in features]
    return new


def _mask(mask: Tensor | None, packing: Packing, past: CacheState) -> Tensor | None:
    """Return the attention mask of the tokens that remain and of those in the cache.

    A mask of two dimensions has columns for the whole sequences; one of four was made for the
    tokens that the cache holds, or for the whole sequences.
    """
    batch, new = len(packing.order), packing.length
    if mask is None:
        mask = packing.order.new_ones(batch, past.length + new)
    held = mask.shape[-1] - new
    before = mask[..., :held]
    if held == past.length:
        before = gather_columns(before, past.columns)
    after = gather_columns(mask[..., held:], packing.order)
    mask = torch.cat((before.expand(batch, *before.shape[1:]), after), -1)
    hidden = ~torch.cat((past.real, packing.real), 1)
    if mask.dim() == 2:
        return hide(mask, hidden)
    rows = packing.order[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
    return hide(mask.gather(2, rows), hidden)


def _question(embeds: Tensor, images: Tensor, rows: Tensor) -> Tensor:
    """Return the mean embedding (R, D) of the tokens beside the images, for R images in `rows`."""
    weights = (~images).to(embeds.dtype).unsqueeze(-1)
    mean = (embeds * weights).sum(1) / weights.sum(1).clamp(min=1)
    return mean[rows[:, 0]]


def _runs_by_length(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (R, 1) and positions (R, n) of the runs of n image tokens, for each n."""
    host = images.to("cpu", torch.int8)
    edges = torch.nn.functional.pad(host, (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    ends = (edges == -1).nonzero(as_tuple=True)[1]
    lengths = ends - starts
    for length in lengths.unique().tolist():
        these = lengths == length
        positions = starts[these, None] + torch.arange(length)
        yield rows[these, None].to(images.device), positions.to(images.device)


def _any_equal(ids: Tensor, values: tuple[int, ...]) -> Tensor:
    return torch.isin(ids, ids.new_tensor(values))


def _current() -> _Call | None:
    calls = CALLS.get()
    return calls[-1] if calls else None


def _cache_in(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def _refuse_packed(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if several texts are packed into one row, whose borders would be lost."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    is_packed = kwargs.get("cu_seq_lens_q") is not None
    if positions is not None and positions.dim() == 2 and mask is None:
        is_packed = is_packed or bool((positions.diff(dim=-1) != 1).any())
    if is_packed:
        raise ValueError(
            "position_ids: expected one text a row, or an attention_mask beside them, got several "
            "texts packed into a row; turn off packing in the data collator"
        )
