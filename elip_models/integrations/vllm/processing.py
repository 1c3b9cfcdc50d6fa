"""The prompt side of vLLM: fewer placeholders for each image, and cache keys with the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from typing import Any, ClassVar

from elip_models.integrations.vllm.settings import serving_strategy
from elip_models.integrations.vllm.tokens import shorten_placeholders
from elip_models.validation import require_extra
from elip_models.vlm.strategies.base import ImageTokenStrategy
from elip_models.vlm.strategies.dedup import Dedup

with require_extra("elip_models.integrations.vllm"):
    from vllm.multimodal.processing import (
        BaseMultiModalProcessor,
        BaseProcessingInfo,
        ProcessorInputs,
        PromptReplacement,
        PromptUpdate,
        PromptUpdateDetails,
        TimingContext,
    )


class ReducedInfo(BaseProcessingInfo):
    """What vLLM asks about a model before it sees an image. Mix it into the info of a family."""

    reduces_videos: ClassVar[bool]

    @cached_property
    def strategy(self) -> ImageTokenStrategy | Dedup:
        """Return the strategy of the model."""
        return serving_strategy(self.get_hf_config().elip)

    @property
    def model_id(self) -> str:
        """Return the part of cache keys that names the model; it has the settings too."""
        return f"{super().model_id} {self.strategy!r}"

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return how many images and clips a prompt may have: no clip that cannot be reduced."""
        limits = super().get_supported_mm_limits()
        if self.reduces_videos:
            return limits
        return {name: 0 if name == "video" else limit for name, limit in limits.items()}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int] | None:
        """Return the most tokens of an image and a clip; vLLM profiles memory by them."""
        whole = super().get_mm_max_tokens_per_item(seq_len, mm_counts)
        if whole is None:
            return whole
        allowed = [name for name, limit in self.allowed_mm_limits.items() if limit]
        return {name: self.strategy.count(whole[name]) for name in allowed if name in whole}


class ReducedProcessor(BaseMultiModalProcessor):
    """The processor of prompts. Mix it into the processor of a family."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> Any:
        """Process a request. vLLM's cache keys are its `multi_modal_uuids`; add the settings."""
        settings = sha256(repr(self.info.strategy).encode()).hexdigest()[:16]
        uuids = {
            modality: [uuid and f"{uuid}-{settings}" for uuid in items]
            for modality, items in (inputs.mm_uuid_items or {}).items()
        }
        return super().apply(replace(inputs, mm_uuid_items=uuids), timing_ctx)

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        """Return what replaces images in the prompt; vLLM's processors define this method."""
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [self._shorten(update, out_mm_kwargs) for update in updates]

    def _count(self, item: Any, modality: str, length: int) -> int:
        """Return how many of the `length` tokens of an image stay; `item` has its arguments."""
        return self.info.strategy.count(length)

    def _shorten(self, update: PromptReplacement, out_mm_kwargs: Any) -> PromptReplacement:
        """Return the replacement of images with fewer placeholders."""
        content, modality = update.replacement, update.modality

        def replacement(index: int) -> PromptUpdateDetails:
            details = content(index) if callable(content) else content
            if isinstance(details, list):
                details = PromptUpdateDetails.from_seq(details)
            ids, is_feature = details.full, details.is_embed
            flags = [True] * len(ids) if is_feature is None else is_feature(ids).tolist()
            count = self._count(out_mm_kwargs[modality][index], modality, sum(flags))
            return replace(details, full=shorten_placeholders(ids, flags, count))

        return replace(update, replacement=replacement)
