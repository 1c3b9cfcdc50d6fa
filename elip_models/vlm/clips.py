"""The clips of a prompt: which tokens are a video's, and how many each of its frames has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import starmap
from math import isqrt
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from elip_models.vlm.families import Multimodal
from elip_models.vlm.packing import find_runs, runs_by_length


def _side(multimodal: Multimodal) -> int:
    """Return how many patches a frame has in a row."""
    vision = multimodal.config.vision_config
    return vision.image_size // vision.patch_size


def _perception_side(multimodal: Multimodal) -> int:
    return isqrt(multimodal.tower.timm_model.patch_embed.num_patches)


FRAME_TOKENS: dict[str, Callable[[Multimodal], int] | None] = {
    "llava_next_video": lambda m: (_side(m) // m.config.spatial_pool_stride) ** 2,
    "llava_onevision": lambda m: ((_side(m) + 1) // 2) ** 2,
    "perception_lm": lambda m: (_perception_side(m) // m.config.projector_pooling_ratio) ** 2,
    "qwen2_5_vl": None,
    "qwen2_vl": None,
    "qwen3_5": None,
    "qwen3_5_moe": None,
    "qwen3_vl": None,
    "qwen3_vl_moe": None,
    "video_llava": lambda m: _side(m) ** 2 + 1,
}
"""The tokens of a frame by `config.model_type`; None if they depend on the size of the video."""
FRAMES_APART = {"qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"}
"""The models that write text between the frames of a clip."""


class TokenGroup(NamedTuple):
    """The tokens of images, or of clips, that have the same number of tokens.

    rows: (R, 1) the sequence of each image.
    positions: (R, n) the positions in the sequence, ascending.
    frame: the tokens of a frame; None for images.
    always: the positions in the image whose tokens have to stay.
    """

    rows: Tensor
    positions: Tensor
    frame: int | None = None
    always: tuple[int, ...] = (-1,)

    @property
    def length(self) -> int:
        """Return how many tokens an image has."""
        return self.positions.shape[1]

    def of(self, indices: list[int]) -> "TokenGroup":
        """Return the tokens of these images of the group."""
        return self._replace(rows=self.rows[indices], positions=self.positions[indices])


def groups_of_images(images: Tensor) -> Iterator[TokenGroup]:
    """Yield the runs of the tokens `images` (B, N) bool by their lengths."""
    yield from starmap(TokenGroup, runs_by_length(images))


@dataclass(frozen=True)
class VideoLayout:
    """How a model arranges the tokens of videos.

    token_id: the placeholder of a video's token.
    frame: the tokens of a frame, or None if they depend on the size of the video.
    are_frames_apart: whether there is text between the frames of a clip.
    merged: how many patches of the tower become a token, if the size of the video varies.
    """

    token_id: int
    frame: int | None
    are_frames_apart: bool
    merged: int

    @classmethod
    def of(cls, multimodal: Multimodal) -> Self | None:
        """Return the layout of a model, or None if it has no tokens of videos."""
        name, config = multimodal.config.model_type, multimodal.config
        if name not in FRAME_TOKENS:
            return None
        count = FRAME_TOKENS[name]
        frame = None if count is None else count(multimodal)
        merged = getattr(config.vision_config, "spatial_merge_size", 1) ** 2
        return cls(config.video_token_id, frame, name in FRAMES_APART, merged)

    def clip_lengths(self, kwargs: dict[str, Any]) -> list[int]:
        """Return the number of tokens of each clip, from the arguments of the whole model."""
        if not self.are_frames_apart:
            return []
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("video")
        if encoded is not None:  # generate has encoded the clips before
            return [len(clip) for clip in encoded.pooler_output]
        grids = kwargs.get("video_grid_thw")
        return [] if grids is None else (grids.prod(1) // self.merged).tolist()

    def clips(
        self, videos: Tensor, lengths: list[int], position_ids: Tensor | None
    ) -> Iterator[TokenGroup]:
        """Yield the clips of a batch.

        Args:
            videos: (B, N) bool, the tokens of videos.
            lengths: of `clip_lengths`.
            position_ids: (.., B, N), as the language model reads them.
        """
        by_size: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for row, positions, frame in self._clips(videos, lengths, position_ids):
            by_size.setdefault((len(positions), frame), []).append((row, positions))
        for (length, frame), clips in by_size.items():
            rows = torch.tensor([[row] for row, _ in clips], device=videos.device)
            positions = torch.stack([tokens for _, tokens in clips]).to(videos.device)
            ends = range(frame - 1, length, frame) if self.are_frames_apart else (-1,)
            yield TokenGroup(rows, positions, frame, tuple(ends))

    def _clips(
        self, videos: Tensor, lengths: list[int], position_ids: Tensor | None
    ) -> Iterator[tuple[int, Tensor, int]]:
        """Yield the row, the positions and the tokens of a frame of each clip."""
        ends, parts, missing = iter(lengths), [], None
        rows, starts, run_lengths = (values.tolist() for values in find_runs(videos))
        for row, start, length in zip(rows, starts, run_lengths, strict=True):
            run = torch.arange(start, start + length)
            if not self.are_frames_apart:
                yield row, run, self.frame or _frame_of(position_ids, row, run)
                continue
            if not parts and (missing := next(ends, None)) is None:
                raise ValueError(
                    "pixel_values_videos: expected the clips of the video tokens in the prompt, "
                    "got fewer; pass those of the whole prompt"
                )
            missing -= length
            parts.append(run)
            if missing == 0:
                yield row, torch.cat(parts), length
                parts = []


def _frame_of(position_ids: Tensor | None, row: int, run: Tensor) -> int:
    """Return after how many tokens of a clip the place of its first token appears again."""
    is_text = position_ids is None or position_ids.dim() < 3
    if not is_text:
        places = position_ids[-2:, row, run]  # row and column of each token
        again = (places == places[:, :1]).all(0).nonzero()[1:2]
        if len(again):
            return int(again)
        is_text = len(run) > 1 and torch.equal(*places)
    if is_text:
        raise ValueError(
            "position_ids: expected the places of a video's tokens in their frames, got positions "
            "of a text, as the model makes them of inputs_embeds alone; pass input_ids"
        )
    return len(run)
