"""The summary of a multimodal language model: tokens, FLOPs and cache of an image."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from elip_models.strategies.summary import Summary, runs
from elip_models.towers import as_tower
from elip_models.vlm.budget import Budget
from elip_models.vlm.families import PATCH_TOKENS, Multimodal
from elip_models.vlm.strategies.base import ImageTokenStrategy
from elip_models.vlm.strategies.dedup import Dedup
from elip_models.vlm.strategies.layer_strategy import LayerStrategy

EXAMPLE_TOKENS = 576  # as of LLaVA-1.5, where the model does not set the number


@dataclass(frozen=True)
class MultimodalSummary:
    """What an image costs a multimodal language model; `print` shows all of it.

    strategy: what selects image tokens before the language model, or None.
    inside: what selects them inside the language model, or None.
    image_tokens, kept_tokens: of an image of the model's own size, if each patch is a token; of a
        tile; else of an example image or clip of 576 tokens.
    layer_tokens: the tokens of the image that each layer of the language model reads.
    prefill_flops: FLOPs of the language model for the kept tokens, selection included, relative to
        those for all tokens of the image. Tokens of text come on top of both.
    cache_bytes: what the kept tokens of an image take in the key-value cache, in the dtype of the
        model.
    dense_cache_bytes: the same for all tokens of the image.
    tower: the reduction of the image tower, or None.
    unit: what the tokens are of: an image, an example, or a tile of a model with cross-attention.
    budget: what replaces the `keep` of a strategy in the calls inside `budget`, or None.
    """

    strategy: ImageTokenStrategy | Dedup | None
    inside: LayerStrategy | None
    image_tokens: int
    kept_tokens: int
    layer_tokens: tuple[int, ...]
    prefill_flops: float
    cache_bytes: int
    dense_cache_bytes: int
    tower: Summary | None
    unit: str = "an example image"
    budget: Budget | None = None

    @classmethod
    def of(
        cls,
        multimodal: Multimodal,
        strategy: ImageTokenStrategy | Dedup | None,
        inside: LayerStrategy | None,
        tower: Summary | None,
        budget: Budget | None = None,
    ) -> "MultimodalSummary":
        """Summarize a model that `strategy`, `inside` and `tower` reduce, within `budget`."""
        cross, (tokens, unit) = multimodal.cross_attention_layers, _tokens_of_an_image(multimodal)
        if cross:
            tokens, unit = multimodal.tower.num_patches, "a tile"
        if strategy is not None and strategy.reads_frames:
            tokens, unit = EXAMPLE_TOKENS, "an example clip"
        if isinstance(strategy, Dedup):
            unit = "an image without repetition"
        depth = len(multimodal.language_model.layers)
        keep = None if budget is None else budget.keep_of_one
        keep_inside = None
        if strategy is None or strategy.keep is None:
            keep, keep_inside = None, keep
        kept = tokens if strategy is None else strategy.count(tokens, keep)
        readers = [i in cross or not cross for i in range(depth)]
        read = (kept,) * depth if inside is None else inside.kept(kept, depth, keep_inside)
        read = tuple(count * reads for count, reads in zip(read, readers, strict=True))
        dense = tuple(tokens * reads for reads in readers)
        reduced = prefill_flops(multimodal, read)
        if kept < tokens and strategy is not None:
            reduced += strategy.flops(tokens, multimodal.text_config.hidden_size)
        share = reduced / prefill_flops(multimodal, dense)
        width = _cache_width(multimodal)
        return cls(
            strategy,
            inside,
            image_tokens=tokens,
            kept_tokens=kept,
            layer_tokens=read,
            prefill_flops=share,
            cache_bytes=sum(read) * width,
            dense_cache_bytes=sum(dense) * width,
            tower=tower,
            unit=unit,
            budget=budget,
        )

    @property
    def keep(self) -> float:
        """Return the share of an image's tokens that the language model reads."""
        return self.kept_tokens / self.image_tokens

    def __str__(self) -> str:
        """Return the summary as a table of two columns."""
        is_dedup = isinstance(self.strategy, Dedup)
        before, front = (self.strategy, None) if is_dedup else (None, self.strategy)
        tower = [str(each) for each in (before, self.tower and self.tower.figures) if each]
        used = [str(strategy) for strategy in (front, self.inside) if strategy is not None]
        cached, dense = _size(self.cache_bytes), _size(self.dense_cache_bytes)
        lines = [
            ("image tower", ", then ".join(tower) or "dense"),
            (
                "language model",
                ", then ".join(used) or f"reads every {'remaining ' * is_dedup}image token",
            ),
            *([] if self.budget is None else [("budget", str(self.budget))]),
            ("image tokens", f"{self.kept_tokens} of {self.image_tokens} in {self.unit}"),
            ("tokens per layer", runs(self.layer_tokens)),
            ("prefill FLOPs", f"{self.prefill_flops:.3f} of dense, for the tokens of {self.unit}"),
            ("cache", f"{cached} of {dense} for {self.unit}"),
        ]
        return "\n".join(f"{name:<18}{value}" for name, value in lines)


def _tokens_of_an_image(multimodal: Multimodal) -> tuple[int, str]:
    """Return the tokens of an image and what image it is: of the model's own size, or an example.

    The model's own is known if each patch of the image tower is a token.
    """
    config = multimodal.config
    if config.model_type in PATCH_TOKENS:
        with suppress(TypeError):  # a tower that no adapter reads
            tower = as_tower(multimodal.tower)
            is_whole = getattr(config, "vision_feature_select_strategy", None) == "full"
            height, width = tower.image_size
            tokens = tower.num_patches + tower.num_prefix_tokens * is_whole
            return tokens, f"an image of {height} x {width} pixels"
    return EXAMPLE_TOKENS, "an example image"


def prefill_flops(multimodal: Multimodal, tokens: Sequence[int]) -> int:
    """Return the FLOPs of the language model's layers, each for a sequence of so many tokens."""
    layers = multimodal.language_model.layers
    config = multimodal.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    total = 0
    for layer, length in zip(layers, tokens, strict=True):
        if (cross := getattr(layer, "cross_attn", None)) is not None:  # keys and values alone
            total += 2 * length * (cross.k_proj.weight.numel() + cross.v_proj.weight.numel())
            continue
        weights = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
        # half of the attention matrix, since each token attends to those before it
        attention = 2 * length * length * config.num_attention_heads * head
        total += 2 * length * weights + attention
    return total


def _cache_width(multimodal: Multimodal) -> int:
    """Return the bytes of a token in the key-value cache of a layer."""
    config = multimodal.text_config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    item = next(multimodal.language_model.parameters()).element_size()
    return 2 * heads * head * item


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
