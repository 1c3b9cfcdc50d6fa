"""Engines of vLLM in this process, and what they generate; for tests on a CPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
)

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs

STEPS = 8
GREEDY = SamplingParams(temperature=0, max_tokens=STEPS, logprobs=1, ignore_eos=True)


class Output(NamedTuple):
    """What a request returned: the tokens of its prompt, new tokens and their log-probability."""

    prompt_length: int
    tokens: list[int]
    log_probs: list[float]


@contextmanager
def engine(folder: Any, settings: dict | None = None, **options: Any) -> Iterator[LLM]:
    """Open a model; `settings` are those of its config's `elip`."""
    overrides = {} if settings is None else {"elip": settings}
    llm = LLM(
        str(folder),
        hf_overrides=overrides,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        limit_mm_per_prompt={"image": 3, "video": 1},
        **options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def generate(llm: LLM, requests: list[dict]) -> list[Output]:
    """Return what the requests return in one batch."""
    return [
        Output(
            len(result.prompt_token_ids),
            list(result.outputs[0].token_ids),
            [next(iter(step.values())).logprob for step in result.outputs[0].logprobs],
        )
        for result in llm.generate(requests, GREEDY, use_tqdm=False)
    ]


def configure(folder: Any, settings: Any, **options: Any) -> Any:
    """Let vLLM read the configuration of a model, without its weights."""
    arguments = EngineArgs(model=str(folder), hf_overrides={"elip": settings}, **options)
    return arguments.create_engine_config()
