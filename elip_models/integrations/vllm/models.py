"""The model side of vLLM: image features are selected, and M-RoPE positions follow them.

A model is a subclass of vLLM's own, with the mixins of this file. Its name here is the architecture
of vLLM's model, a key of `families.FAMILIES`, and it is built on first use.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.positions import (
    COLUMNS,
    decode_offsets,
    encode_offsets,
    grid_offsets,
    prompt_positions,
    whole_starts,
)
from elip_models.integrations.vllm.processing import ReducedInfo, ReducedProcessor
from elip_models.integrations.vllm.settings import serving_strategy
from elip_models.integrations.vllm.tokens import select_features
from elip_models.validation import require_extra

with require_extra("elip_models.integrations.vllm"):
    from vllm.multimodal import MULTIMODAL_REGISTRY


class ReducedModel:
    """A model whose language model reads a part of the image tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        self.strategy = serving_strategy(model_config.hf_config.elip)
        self.text_width = model_config.get_inputs_embeds_size()

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the features of images that stay, a tensor (k, D) for each image."""
        items = super().embed_multimodal(**kwargs)
        if items is None:
            return items
        return [select_features(item, self.text_width, self.strategy) for item in items]


class MRoPEOffsets:
    """The part of a model with M-RoPE in which remaining image tokens keep their positions."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        size = 3, vllm_config.scheduler_config.max_num_batched_tokens + 1
        for name in ("offsets", "positions"):  # CUDA graphs need fixed addresses
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64), persistent=False)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the features of images, with the digits of each token's offset behind them."""
        items = super().embed_multimodal(**kwargs)
        if not items:
            return items
        return [
            torch.cat((item, encode_offsets(offsets, item.dtype).to(item.device)), 1)
            for item, offsets in zip(items, self._offsets_of_items(kwargs), strict=True)
        ]

    def _offsets_of_items(self, kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """Yield the offsets (3, n) of each image, or of each clip."""
        modality, vision = self.get_input_modality(kwargs), self.config.vision_config
        grids, merge = kwargs[f"{modality}_grid_thw"].tolist(), vision.spatial_merge_size
        steps = [1.0] * len(grids)
        if modality == "video":
            rate, seconds = getattr(vision, "tokens_per_second", 1.0), steps
            if kwargs.get("second_per_grid_ts") is not None:
                seconds = kwargs["second_per_grid_ts"].tolist()
            steps = [rate * second for second in seconds]
        for (frames, rows, columns), step in zip(grids, steps, strict=True):
            yield grid_offsets(frames, rows // merge, columns // merge, step)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return the positions (3, M) of a prompt, and the distance to those of new tokens."""
        items = sorted(mm_features, key=lambda item: item.mm_position.offset)
        kept = [item.mm_position.length for item in items]
        grids = [item.data[f"{item.modality}_grid_thw"].data for item in items]
        merged = self.config.vision_config.spatial_merge_size**2
        whole = [int(grid.prod()) // merged for grid in grids]
        starts = whole_starts([item.mm_position.offset for item in items], kept, whole)
        items = [
            replace(item, mm_position=replace(item.mm_position, offset=start, length=length))
            for item, start, length in zip(items, starts, whole, strict=True)
        ]
        removed = sum(whole) - sum(kept)
        tokens = [0] * (len(input_tokens) + removed)  # only their number counts
        positions, delta = super().get_mrope_input_positions(tokens, items)
        return prompt_positions(positions, starts, kept, whole), delta + removed

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Return the embeddings of a step's tokens; the offsets of its image tokens are stored."""
        offsets = self.offsets[:, : len(input_ids)].zero_()
        if multimodal_embeddings:
            digits = torch.cat([item[:, -COLUMNS:] for item in multimodal_embeddings])
            is_image = is_multimodal.to(offsets.device, non_blocking=True)
            offsets.masked_scatter_(is_image, decode_offsets(digits))
            multimodal_embeddings = [item[:, :-COLUMNS] for item in multimodal_embeddings]
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a step; the offsets of `embed_input_ids` are added to the positions (3, T)."""
        length = positions.shape[1]
        moved = self.positions[:, :length]
        positions = torch.add(positions, self.offsets[:, :length], out=moved)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


def build(
    architecture: str,
    *,
    mixins: tuple[type, ...],
    processor: type = ReducedProcessor,
    dummy_inputs: tuple[type, ...] = (),
) -> type:
    """Return the reduced model of an architecture, with its processor registered.

    Args:
        architecture: a key of `FAMILIES`.
        mixins: of the model.
        processor: the mixin of the processor.
        dummy_inputs: the mixins of the builder of dummy inputs.
    """
    family = FAMILIES[architecture]
    file = import_module(f"vllm.model_executor.models.{family.file}")
    info = _mixed(
        getattr(file, f"{family.prompts}ProcessingInfo"),
        ReducedInfo,
        reduces_videos=family.has_videos,
    )
    register = MULTIMODAL_REGISTRY.register_processor(
        _mixed(getattr(file, f"{family.prompts}MultiModalProcessor"), processor),
        info=info,
        dummy_inputs=_mixed(
            getattr(file, f"{family.dummy_inputs}DummyInputsBuilder"), *dummy_inputs
        ),
    )
    return register(_mixed(getattr(file, family.model), *mixins))


def _mixed(stock: type, *mixins: type, **attributes: Any) -> type:
    """Return a subclass of a class of vLLM, of the same name."""
    return type(stock.__name__, (*mixins, stock), {"__module__": __name__, **attributes})


def __getattr__(name: str) -> type:
    """Build a model on first use."""
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    mixins = (ReducedModel, MRoPEOffsets) if FAMILIES[name].has_mrope else (ReducedModel,)
    return globals().setdefault(name, build(name, mixins=mixins))
