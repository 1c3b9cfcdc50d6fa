"""`dedup` in vLLM: patches are removed before the image tower, by the pixels of an image.

The processor passes on the patches that stay, with a mask of all units. The number of placeholders
follows from it. vLLM's tower takes the positions and segments of its patches as an argument, and
then reads the remaining ones alone.

A model is that of `models`, with the mixins of this file in place of the selection of features.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.models import MRoPEOffsets, build
from elip_models.integrations.vllm.patches import normalised, remaining_metadata, units_of_items
from elip_models.integrations.vllm.processing import ReducedProcessor
from elip_models.validation import require_extra
from elip_models.vlm.redundant_patches import remaining_units

with require_extra("elip_models.integrations.vllm"):
    from PIL import Image
    from vllm.multimodal.inputs import MultiModalFieldConfig
    from vllm.multimodal.processing import BaseDummyInputsBuilder

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The argument of models with the patches of a modality."""
UNITS = "{}_remaining_units"
"""The argument with a mask of the units of a modality."""


class RemainingPatches:
    """A model whose image tower reads the patches that its processor passes on."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the features of images, a tensor (k, D) for each image or clip."""
        modality, size = self.get_input_modality(kwargs), self.visual.spatial_merge_size**2
        items = self._units_of_items(kwargs)
        metadata = self.visual.prepare_encoder_metadata(kwargs[f"{modality}_grid_thw"].tolist())
        metadata = remaining_metadata(metadata, torch.cat(items), size)
        features = self.visual(kwargs[PIXELS[modality]], None, encoder_metadata=metadata)
        return features.split([int(item.sum()) for item in items])

    def _units_of_items(self, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return which units of each image stay, (U,) bool on the CPU."""
        modality, size = self.get_input_modality(kwargs), self.visual.spatial_merge_size**2
        stays = kwargs[UNITS.format(modality)]
        return units_of_items(stays, kwargs[f"{modality}_grid_thw"], size)


class RemainingOffsets(MRoPEOffsets, RemainingPatches):
    """The same, in which the tokens of remaining patches keep their positions."""

    def _offsets_of_items(self, kwargs: dict[str, Any]) -> Iterator[Tensor]:
        items = self._units_of_items(kwargs)
        for offsets, units in zip(super()._offsets_of_items(kwargs), items, strict=True):
            yield offsets[:, units]


class PatchProcessor(ReducedProcessor):
    """The processor of prompts. Mix it into the processor of a family."""

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any], processed_data: Any
    ) -> Any:
        """Remove patches; vLLM's processors define this method."""
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        config = self.info.get_hf_config().vision_config
        for modality, name in PIXELS.items():
            if name in data:
                patches, grid = data[name], data[f"{modality}_grid_thw"]
                stays = remaining_units(self.info.strategy, self._normalised(patches), grid, config)
                data[name] = patches[stays.repeat_interleave(config.spatial_merge_size**2)]
                data[UNITS.format(modality)] = stays
        return data

    def _normalised(self, patches: Tensor) -> Tensor:
        """Return patches (N, C x V) as the model reads them; it may normalise them itself."""
        if not self.info.ctx.get_mm_config().mm_device_do_normalize:
            return patches
        images = self.info.get_image_processor()
        return normalised(patches, images.image_mean, images.image_std, images.rescale_factor)

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        """Return how arguments belong to images; vLLM's processors define this method."""
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        size = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        for modality, name in PIXELS.items():
            if name in hf_inputs:
                units, grid = UNITS.format(modality), hf_inputs[f"{modality}_grid_thw"]
                items = units_of_items(hf_inputs[units], grid, size)
                kept = grid.new_tensor([int(item.sum()) * size for item in items])
                every = grid.prod(-1) // size
                fields[name] = MultiModalFieldConfig.flat_from_sizes(modality, kept)
                fields[units] = MultiModalFieldConfig.flat_from_sizes(
                    modality, every, keep_on_cpu=True
                )
        return fields

    def _count(self, item: Any, modality: str, length: int) -> int:
        return int(item[UNITS.format(modality)].data.sum())


class NoiseInputs(BaseDummyInputsBuilder):
    """The dummy images and clips by which vLLM measures memory: all of their patches stay."""

    def get_dummy_mm_data(self, *args: Any, **kwargs: Any) -> Any:
        """Return noise in place of blank images."""
        data = super().get_dummy_mm_data(*args, **kwargs)
        return {modality: [_noise(item) for item in items] for modality, items in data.items()}


def _noise(item: Any) -> Any:
    """Return an image or a clip, with metadata or without, of random pixels."""
    if isinstance(item, tuple):
        frames, metadata = item
        return _noise(frames), metadata
    shape = np.asarray(item).shape
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels) if isinstance(item, Image.Image) else pixels


def __getattr__(name: str) -> type:
    """Build a model on first use."""
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    model = build(
        name,
        mixins=(RemainingOffsets,),
        processor=PatchProcessor,
        dummy_inputs=(NoiseInputs,),
    )
    return globals().setdefault(name, model)
