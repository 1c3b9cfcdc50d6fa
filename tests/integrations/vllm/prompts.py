"""Requests with images, and what transformers generates for them with `reduce_`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image, ImageDraw
from torch import nn
from transformers.video_utils import VideoMetadata

import elip_models
from benchmarks.random_models import VIDEO, VISION_END, VISION_START
from elip_models.vlm.families import find_multimodal
from tests.integrations.vllm.engines import STEPS, Output

SIZES = ((112, 168), (140, 112), (84, 196))
ROUNDING = 2e-5
"""Of log-probabilities, between two implementations of a model in fp32."""


def images() -> list[Image.Image]:
    """Return random images of different sizes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in SIZES]


def page(seed: int = 0, size: tuple[int, int] = (168, 252)) -> Image.Image:
    """Return a page of lines and a picture, with white margins."""
    picture = Image.new("RGB", size, "white")
    draw, rng = ImageDraw.Draw(picture), np.random.default_rng(seed)
    for line in range(4):
        text = " ".join(map(str, rng.integers(10, 99, 5)))
        draw.text((30, 30 + 14 * line), text, "black")
    picture.paste(Image.fromarray(rng.integers(0, 255, (40, 70, 3), dtype=np.uint8)), (40, 120))
    return picture


def request(processor: Any, text: str, *pictures: Image.Image) -> dict[str, Any]:
    """Return a request of vLLM: the text, behind each picture."""
    words = {"type": "text", "text": text}
    content = [part for _ in pictures for part in ({"type": "image"}, words)] or [words]
    messages = [{"role": "user", "content": content}]
    made = {"prompt": processor.tokenizer.apply_chat_template(messages, tokenize=False)}
    return made | ({"multi_modal_data": {"image": list(pictures)}} if pictures else {})


def requests(processor: Any) -> list[dict[str, Any]]:
    """Return requests with one, two and three images, and one of text alone."""
    first, second, third = images()
    return [
        request(processor, "what is it?", first),
        request(processor, "compare", second, third),
        request(processor, "which one?", third, first, second),
        request(processor, "hello"),
    ]


def next_positions(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Give the language model consecutive positions, as vLLM does without M-RoPE."""
    before = kwargs["past_key_values"].get_seq_length()
    length = kwargs["inputs_embeds"].shape[1]
    return args, kwargs | {"position_ids": torch.arange(before, before + length)[None]}


def clip_request(family: str, text: str, length: int = 8, rate: float = 2.0) -> dict[str, Any]:
    """Return a request with a clip whose frames have a white band, and the text behind it."""
    frames = np.random.default_rng(1).integers(0, 255, (length, 112, 84, 3), dtype=np.uint8)
    frames[:, 28:84] = 255
    info = dict(fps=rate, duration=length / rate, total_num_frames=length)
    info |= dict(frames_indices=list(range(length)))
    info |= dict(video_backend="opencv", do_sample_frames=False)
    placeholder = VIDEO if family == "llava_onevision" else VISION_START + VIDEO + VISION_END
    clip = (frames, info) if family == "qwen2_5_vl" else frames
    return {"prompt": f"user: {placeholder}{text}", "multi_modal_data": {"video": clip}}


def assert_equal_to(outputs: Iterable[Output], references: Iterable[Output]) -> None:
    """Assert that tokens are equal, and log-probabilities but for rounding."""
    for output, reference in zip(outputs, references, strict=True):
        assert output.prompt_length == reference.prompt_length
        assert output.tokens == reference.tokens
        assert output.log_probs == pytest.approx(reference.log_probs, abs=ROUNDING)


class TextBehindTimes:
    """Positions of transformers, in which the text behind a clip continues behind its times too.

    Set it in the place of the `get_rope_index` of a model. `shifts` has the distance to the
    positions of transformers, for each prompt.
    """

    def __init__(self, stock: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.stock = stock
        self.shifts: list[int] = []

    def __call__(
        self, input_ids: torch.Tensor, *, mm_token_type_ids: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions, deltas = self.stock(input_ids, mm_token_type_ids=mm_token_type_ids, **kwargs)
        text = int(mm_token_type_ids[0].nonzero().max()) + 1
        shift = positions[..., :text].max() + 1 - positions[0, 0, text]
        self.shifts.append(int(shift))
        positions[..., text:] += shift
        return positions, positions.amax((0, 2))[:, None].to(deltas) + 1 - input_ids.shape[1]


class Reference:
    """The model of transformers in a folder, reduced by `reduce_`."""

    def __init__(self, folder: Path, strategy: str, keep: float | None = None) -> None:
        self.processor = hf.AutoProcessor.from_pretrained(folder)
        model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model = elip_models.reduce_(model.eval(), strategy, keep=keep)
        if not hasattr(model.model, "get_rope_index"):
            language_model = find_multimodal(model).language_model
            language_model.register_forward_pre_hook(next_positions, with_kwargs=True)

    @torch.no_grad()
    def generate(self, request: dict[str, Any]) -> Output:
        """Return the most probable tokens."""
        data = request.get("multi_modal_data", {})
        options: dict[str, Any] = {"images": data.get("image")}
        if "video" in data:
            clip = data["video"]
            options = {"videos": [clip], "do_sample_frames": False}
            if isinstance(clip, tuple):
                info = {k: v for k, v in clip[1].items() if k != "do_sample_frames"}
                options |= {"videos": [clip[0]], "video_metadata": [VideoMetadata(**info)]}
        inputs = self.processor(text=[request["prompt"]], return_tensors="pt", **options)
        with elip_models.record_stages(self.model) as prompts:
            result = self.model.generate(
                **inputs,
                max_new_tokens=STEPS,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        log_probs = [
            step[0].log_softmax(-1)[token].item()
            for step, token in zip(result.logits, tokens, strict=True)
        ]
        return Output(int(prompts[0].kept.sum()), tokens, log_probs)
