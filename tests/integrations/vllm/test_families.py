"""Every family in vLLM: against transformers, against vLLM's own model, and with each cache."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install 'elip-kernels[vllm-test]'")

from elip_models.integrations.vllm import models
from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.positions import grid_offsets
from elip_models.integrations.vllm.tokens import select_features
from tests.integrations.vllm.checkpoints import MODELS, save_checkpoint
from tests.integrations.vllm.engines import engine, generate
from tests.integrations.vllm.prompts import (
    ROUNDING,
    Reference,
    TextBehindTimes,
    assert_equal_to,
    clip_request,
    images,
    request,
    requests,
)

pytestmark = pytest.mark.slow
WITH_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl")
M_ROPE = [family for family in MODELS if family.startswith("qwen")]


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def test_every_family_of_the_table_has_a_checkpoint():
    assert len(MODELS) == len(FAMILIES)


def test_reduced_prompts_equal_those_of_transformers(folder):
    reference = Reference(folder, "diverse", 0.25)
    prompts = requests(reference.processor)
    with engine(folder, {"keep": 0.25}) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts]
        cached = [generate(llm, [prompt])[0] for prompt in prompts]
        batch = generate(llm, prompts)
        longer = [prompt | {"prompt": prompt["prompt"] + "more"} for prompt in prompts]
        behind_prefix = [generate(llm, [prompt])[0] for prompt in longer]
    assert_equal_to(alone, map(reference.generate, prompts))
    assert_equal_to(behind_prefix, map(reference.generate, longer))
    assert cached == alone
    assert batch == alone
    with engine(folder, {"keep": 0.25}, max_num_batched_tokens=10, max_num_seqs=4) as llm:
        assert [generate(llm, [prompt])[0] for prompt in prompts] == alone


@pytest.mark.parametrize("folder", ["llava_onevision"], indirect=True)
def test_rounding_does_not_select_among_tokens_that_an_image_of_one_tile_has_twice(
    folder, monkeypatch
):
    def select_rounded(features, *strategy):
        return select_features(features * (1 + 1e-6 * torch.randn_like(features)), *strategy)

    monkeypatch.setattr(models, "select_features", select_rounded)
    reference = Reference(folder, "diverse", 0.25)
    prompts = [
        request(reference.processor, "what is it?", image.resize((side, side)))
        for image, side in zip(images(), (112, 112, 90), strict=True)
    ]
    with engine(folder, {"keep": 0.25}) as llm:
        outputs = generate(llm, prompts)
    assert_equal_to(outputs, map(reference.generate, prompts))


def test_every_token_equals_the_stock_model(folder):
    prompts = requests(Reference(folder, "stride", 1.0).processor)
    outputs = []
    for settings in (None, {"keep": 1.0}):
        with engine(folder, settings) as llm:
            outputs.append(generate(llm, prompts))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("folder", WITH_VIDEOS, indirect=True)
def test_clips_equal_those_of_transformers(folder):
    reference = Reference(folder, "stride", 0.3)
    prompt = clip_request(reference.model.config.model_type, "what happens?")
    with engine(folder, {"strategy": "stride", "keep": 0.3}) as llm:
        outputs = [generate(llm, [prompt])[0] for _ in range(2)]
    assert_equal_to(outputs, [reference.generate(prompt)] * 2)


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
def test_long_clips_equal_transformers_if_text_continues_behind_their_times(folder):
    reference = Reference(folder, "stride", 0.3)
    model = reference.model.model
    model.get_rope_index = behind = TextBehindTimes(model.get_rope_index)
    clips = ((6, 2.0), (8, 2.0), (8, 4.0), (12, 2.0), (8, 1.0), (14, 3.0))
    prompts = [clip_request("qwen2_5_vl", "what happens?", *clip) for clip in clips]
    with engine(folder, {"strategy": "stride", "keep": 0.3}) as llm:
        outputs = [generate(llm, [prompt])[0] for prompt in prompts]
    expected = [reference.generate(prompt) for prompt in prompts]
    assert [shift > 0 for shift in behind.shifts] == [False] * 3 + [True] * 3
    assert_equal_to(outputs, expected)


@pytest.mark.parametrize("folder", M_ROPE, indirect=True)
def test_positions_without_offsets_are_noticed(folder, monkeypatch):
    reference = Reference(folder, "diverse", 0.25)
    prompts = requests(reference.processor)
    monkeypatch.setattr(models, "grid_offsets", lambda *grid: torch.zeros_like(grid_offsets(*grid)))
    with engine(folder, {"keep": 0.25}) as llm:
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference.generate(prompt).log_probs[0]
        is_equal = output.log_probs[0] == pytest.approx(expected, abs=ROUNDING)
        assert is_equal == ("multi_modal_data" not in prompt)


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_two_settings_in_one_process_do_not_share_a_cache(folder):
    for strategy, keep in (("pool", 0.25), ("stride", 0.5)):
        reference = Reference(folder, strategy, keep)
        prompts = requests(reference.processor)
        with engine(folder, {"strategy": strategy, "keep": keep}) as llm:
            assert_equal_to(generate(llm, prompts), map(reference.generate, prompts))
