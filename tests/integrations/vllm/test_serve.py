"""`vllm serve` with a model of `save_reduced`, and the client of OpenAI."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="needs vLLM: pip install 'elip-kernels[vllm-test]'")

import openai

import elip_models
from benchmarks.serving import CPU_OPTIONS, message, serve
from tests.integrations.vllm.checkpoints import save_checkpoint
from tests.integrations.vllm.engines import STEPS
from tests.integrations.vllm.prompts import Reference, images, request

pytestmark = pytest.mark.slow
QUESTION = "what is it?"


def ask(client, picture, **options):
    """Send the picture and the question."""
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=message(picture, QUESTION),
        temperature=0,
        max_tokens=STEPS,
        extra_body={"ignore_eos": True, "return_token_ids": True},
        **options,
    )


def test_a_saved_model_answers_as_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    reference = Reference(save_checkpoint("qwen2_5_vl", tmp_path), "diverse", 0.25)
    elip_models.save_reduced(reference.model, tmp_path)
    expected = [
        reference.generate(request(reference.processor, QUESTION, picture)) for picture in images()
    ]
    with serve(tmp_path, *CPU_OPTIONS) as (address, log):
        client = openai.OpenAI(base_url=address, api_key="none")
        with ThreadPoolExecutor(len(images())) as pool:
            answers = list(pool.map(lambda picture: ask(client, picture), images()))
        choices = [part.choices[0] for part in ask(client, images()[0], stream=True)]
        streamed = [
            token for choice in choices for token in choice.model_extra.get("token_ids") or ()
        ]
        lines = log.read_text()
    lengths = [answer.usage.prompt_tokens for answer in answers]
    assert lengths == [output.prompt_length for output in expected]
    tokens = [answer.choices[0].token_ids for answer in answers]
    assert tokens == [output.tokens for output in expected]
    assert streamed == expected[0].tokens
    assert lines.count("diverse(keep=0.25) keeps 144 tokens of an image of 576") == 1
