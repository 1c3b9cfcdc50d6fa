"""`dedup` in vLLM: against transformers, against vLLM's own model, and with each cache."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install 'elip-kernels[vllm-test]'")

from vllm.multimodal import MULTIMODAL_REGISTRY

from elip_models.integrations.vllm.patch_models import UNITS
from tests.integrations.vllm.checkpoints import save_checkpoint
from tests.integrations.vllm.engines import configure, engine, generate
from tests.integrations.vllm.prompts import (
    Reference,
    assert_equal_to,
    clip_request,
    images,
    page,
    request,
)
from tests.integrations.vllm.test_checks import save_config

pytestmark = pytest.mark.slow
DEDUP = {"strategy": "dedup"}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def folder(request, tmp_path_factory):
    return save_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


def pages(processor):
    """Return requests with one, two and three images, pages and others, and one of text alone."""
    first, second, photograph = page(0), page(1, (196, 140)), images()[0]
    return [
        request(processor, "what is it?", first),
        request(processor, "compare", second, first),
        request(processor, "which one?", first, photograph, second),
        request(processor, "hello"),
    ]


def test_pages_equal_those_of_transformers(folder):
    reference = Reference(folder, "dedup")
    prompts = pages(reference.processor)
    with engine(folder, DEDUP) as llm:
        alone = [generate(llm, [prompt])[0] for prompt in prompts]
        cached = [generate(llm, [prompt])[0] for prompt in prompts]
        batch = generate(llm, prompts)
        longer = [prompt | {"prompt": prompt["prompt"] + "more"} for prompt in prompts]
        behind_prefix = [generate(llm, [prompt])[0] for prompt in longer]
    assert_equal_to(alone, map(reference.generate, prompts))
    assert_equal_to(behind_prefix, map(reference.generate, longer))
    assert cached == alone
    assert batch == alone
    with engine(folder, DEDUP, max_num_batched_tokens=10, max_num_seqs=4) as llm:
        assert [generate(llm, [prompt])[0] for prompt in prompts] == alone


@pytest.mark.parametrize("folder", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_images_without_repetition_equal_the_stock_model(folder):
    processor = Reference(folder, "dedup").processor
    whole = [request(processor, "what is it?", *images()), request(processor, "hello")]
    part = request(processor, "what is it?", page())
    outputs, patches = [], []
    for settings in (None, DEDUP):
        with engine(folder, settings) as llm:
            outputs.append(generate(llm, whole))
            count_patches(llm, patches)
            generate(llm, [part])
    assert outputs[0] == outputs[1]
    assert patches[0] == 4 * 54 and patches[1] < 0.7 * patches[0]


def count_patches(llm, patches):
    """Append to a list how many patches the image tower reads, in later calls."""

    def count(tower, args):
        patches.append(len(args[0]))

    def watch(model):
        model.visual.register_forward_pre_hook(count)

    llm.apply_model(watch)


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
def test_clips_equal_those_of_transformers(folder):
    reference = Reference(folder, "dedup")
    prompt = clip_request(reference.model.config.model_type, "what happens?")
    with engine(folder, DEDUP) as llm:
        outputs = [generate(llm, [prompt])[0] for _ in range(2)]
    assert_equal_to(outputs, [reference.generate(prompt)] * 2)


def test_memory_is_measured_with_images_and_clips_that_keep_every_patch(tmp_path):
    save_config("qwen2_5_vl", tmp_path)
    processor = MULTIMODAL_REGISTRY.create_processor(configure(tmp_path, DEDUP).model_config)
    counts = {"image": 1, "video": 1}
    for modality, (item,) in processor.get_dummy_mm_inputs(counts)["mm_kwargs"].items():
        assert item[UNITS.format(modality)].data.all()


def test_servers_with_another_tolerance_share_no_entry(tmp_path):
    save_config("qwen2_5_vl", tmp_path)
    keys = []
    for tolerance in (0.1, 0.4):
        settings = DEDUP | {"tolerance": tolerance}
        processor = MULTIMODAL_REGISTRY.create_processor(configure(tmp_path, settings).model_config)
        prompt = [processor.info.get_hf_config().image_token_id] * 2
        items = processor.info.parse_mm_data({"image": [page(0), page(1)]})
        keys += processor(prompt, items, {"image": ["a", None]})["mm_hashes"]["image"]
    assert len(set(keys)) == 4
