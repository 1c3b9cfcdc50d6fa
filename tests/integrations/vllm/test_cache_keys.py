"""The keys by which vLLM caches images, between servers with other settings."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install 'elip-kernels[vllm-test]'")

from vllm.multimodal import MULTIMODAL_REGISTRY

from tests.integrations.vllm.engines import configure
from tests.integrations.vllm.prompts import images
from tests.integrations.vllm.test_checks import save_config

pytestmark = pytest.mark.slow


def keys(folder, settings, uuid):
    """Return the cache keys of two images, the first with a uuid."""
    processor = MULTIMODAL_REGISTRY.create_processor(configure(folder, settings).model_config)
    items = processor.info.parse_mm_data({"image": images()[:2]})
    prompt = [processor.info.get_hf_config().image_token_index] * 2
    return processor(prompt, items, {"image": [uuid, None]})["mm_hashes"]["image"]


def test_servers_with_other_settings_share_no_entry_of_a_uuid(tmp_path):
    save_config("llava", tmp_path)
    half = keys(tmp_path, {"keep": 0.5}, "a")
    assert keys(tmp_path, {"keep": 0.5}, "a") == half
    assert keys(tmp_path, {"keep": 0.5}, "b")[0] != half[0]
    assert not set(keys(tmp_path, {"keep": 0.25}, "a")) & set(half)
    assert not set(keys(tmp_path, {"strategy": "stride", "keep": 0.5}, "a")) & set(half)
    assert keys(tmp_path, None, "a")[0] == "a"
