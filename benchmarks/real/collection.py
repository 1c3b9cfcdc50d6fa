"""Embed a collection of photographs with DINOv2 ViT-S/14, dense and reduced, and search in both.

    python -m benchmarks.real.collection FOLDER WORK --output X.json [--reduce tome --keep 0.7]
    python -m benchmarks.real.collection FOLDER WORK --output X.json --ray-actors 2 --timed 768

WORK is a folder for the model and the embeddings; a stopped run continues there. Each round of the
speeds embeds some photographs by `elip_models.embed`, and encodes the same photographs from memory
by the model alone ("bare"), dense and reduced. Run it while nothing else runs. The second command
adds the speed of the reduced model by actors of Ray to X.json, beside both others.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from benchmarks.machine import machine
from benchmarks.real.dinov2 import MEAN, PIXELS, STD, timm_model
from benchmarks.real.photographs import photograph_paths
from elip_models import embed, reduce_, save_reduced
from elip_models.embedding.decoding import decoded_sample, default_workers
from elip_models.embedding.encoder import Encoder, open_encoder
from elip_models.embedding.output import CHECK
from elip_models.embedding.search import compare_neighbours
from elip_models.embedding.source import open_images
from elip_models.profiling.commit import commit
from elip_models.saving.files import read_object, write_json

BATCH, SHARD = 32, 1000
PREPROCESS_FILE = "preprocess.json"
QUERIES = 1000
PREPROCESS = {"size": PIXELS, "crop": 1.0, "interpolation": "bicubic", "mean": MEAN, "std": STD}
ARMS = {"dense": "none", "reduced": None}
"""The argument `reduce` of each arm; None is the reduction that the model was saved with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.collection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder of JPEG or PNG files")
    add("work", type=Path, help="where the model and the embeddings are written")
    add("--output", type=Path, required=True, metavar="X.json")
    add("--images", type=int, default=8000, help="photographs at most (default: %(default)s)")
    add("--reduce", default="tome", help="strategy (default: %(default)s)")
    add("--keep", type=float, default=0.7, help="share of the tokens (default: %(default)s)")
    add("--rounds", type=int, default=5, help="of the speeds (default: %(default)s)")
    add("--timed", type=int, default=128, help="photographs of a round (default: %(default)s)")
    add("--ray-actors", type=int, metavar="N", help="add the speed of N actors to --output")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        run = measure if options.ray_actors is None else with_ray
        write_json(options.output, run(options, console))
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    console.print_json(json.dumps(read_object(options.output)))
    return 0


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return speeds, agreement of the embeddings, and recall of the search."""
    paths = photograph_paths(options.folder)[: options.images]
    model = _saved_model(options)
    photographs = _listed(options.work / "photographs.json", paths)
    speeds = _speeds(options, model, paths, console)
    for arm, reduction in ARMS.items():
        _embed(model, photographs, options.work / arm, reduction, len(paths), console)
    check = read_object(options.work / "reduced" / CHECK)
    recall = compare_neighbours(
        *(options.work / arm for arm in ARMS), queries=min(QUERIES, len(paths))
    )
    counts = read_object(options.work / "reduced" / "manifest.json")["counts"]
    return {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "model": "vit_small_patch14_dinov2",
        "photographs": len(paths),
        "counts": counts,
        "speed": {"rounds": options.rounds, "photographs": options.timed, "batch": BATCH},
        "dense": speeds["dense"],
        "reduced": {
            "strategy": options.reduce,
            "keep": options.keep,
            **speeds["reduced"],
            "time_ratio": check["time_ratio"],
            "compared": check["images"],
            "cosine": check["cosine"],
            "neighbours": check["neighbours"],
            "recall_at_10": recall.recall._asdict(),
            "queries": recall.queries,
        },
    }


def with_ray(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results in `--output` with the speed of Ray's actors."""
    document = read_object(options.output)
    reduced = document["reduced"]
    options.reduce, options.keep = reduced["strategy"], reduced["keep"]
    model = _saved_model(options)
    timed = _listed(options.work / "timed.json", photograph_paths(options.folder)[: options.timed])
    encoder = open_encoder(str(model), preprocess=model / PREPROCESS_FILE)
    pixels = _pixels(encoder, timed, options.timed)
    rates: dict[str, list[float]] = {"bare": [], "one process": [], "actors": []}
    with _bar(console) as bar:
        for _ in bar.track(range(options.rounds), description="speeds"):
            rates["bare"].append(_bare(encoder, pixels))
            rates["one process"].append(_embedded(encoder, timed))
            rates["actors"].append(_embedded_by_ray(encoder, timed, options.ray_actors))
    shares = [a / b for a, b in zip(rates["actors"], rates["bare"], strict=True)]
    return document | {
        "ray": {
            "machine": machine(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit(),
            "rounds": options.rounds,
            "photographs": options.timed,
            "actors": options.ray_actors,
            "images_per_second": {name: round(median(each), 3) for name, each in rates.items()},
            "share_of_bare": _spread(shares),
        }
    }


def _saved_model(options: argparse.Namespace) -> Path:
    """Return the folder of the reduced model, which is written if it is not there."""
    folder = options.work / f"model_{options.reduce}_{options.keep:g}"
    if not folder.is_dir():
        options.work.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.partial")
        model = reduce_(timm_model(), options.reduce, keep=options.keep)
        save_reduced(model, partial, config={"img_size": PIXELS})
        (partial / PREPROCESS_FILE).write_text(json.dumps(PREPROCESS))
        partial.rename(folder)
    return folder


def _embed(
    model: Path, source: Path, output: Path, reduction: str | None, images: int, console: Console
) -> None:
    """Embed all photographs, or those that an earlier run left."""
    with _bar(console) as bar:
        task = bar.add_task(output.name, total=images)
        embed(
            str(model),
            source,
            output,
            reduce=reduction,
            progress=lambda done, *_: bar.update(task, completed=done),
            preprocess=model / PREPROCESS_FILE,
            batch_size=BATCH,
            shard_size=SHARD,
        )


def _listed(path: Path, photographs: Sequence[Path]) -> Path:
    """Write a list of photographs that `embed` reads."""
    path.write_text(json.dumps([str(each.resolve()) for each in photographs]))
    return path


def _speeds(
    options: argparse.Namespace, model: Path, paths: Sequence[Path], console: Console
) -> dict[str, dict[str, Any]]:
    """Return images per second of `embed` and of the model alone, medians over the rounds."""
    timed = _listed(options.work / "timed.json", paths[: options.timed])
    encoders = {
        arm: open_encoder(str(model), reduce=reduction, preprocess=model / PREPROCESS_FILE)
        for arm, reduction in ARMS.items()
    }
    pixels = _pixels(encoders["dense"], timed, options.timed)
    rates: dict[str, dict[str, list[float]]] = {
        arm: {"images_per_second": [], "bare_images_per_second": []} for arm in ARMS
    }
    with _bar(console) as bar:
        for _ in bar.track(range(options.rounds), description="speeds"):
            for arm, encoder in encoders.items():
                rates[arm]["bare_images_per_second"].append(_bare(encoder, pixels))
                rates[arm]["images_per_second"].append(_embedded(encoder, timed))
    found = {}
    for arm, of_arm in rates.items():
        bare, ours = of_arm["bare_images_per_second"], of_arm["images_per_second"]
        shares = [a / b for a, b in zip(ours, bare, strict=True)]
        found[arm] = {name: round(median(each), 3) for name, each in of_arm.items()}
        found[arm]["share_of_bare"] = _spread(shares)
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, mid, high = (round(each(values), 4) for each in (min, median, max))
    return {"median": mid, "low": low, "high": high}


def _pixels(encoder: Encoder, photographs: Path, count: int) -> torch.Tensor:
    source = open_images(photographs)
    return decoded_sample(source, count, encoder.preprocessing.transform, 0).pixels


def _bare(encoder: Encoder, pixels: torch.Tensor) -> float:
    return _rate(lambda: [encoder(batch) for batch in pixels.split(BATCH)], len(pixels))


def _embedded(encoder: Encoder, timed: Path) -> float:
    with TemporaryDirectory() as output:
        workers = default_workers(encoder.device)
        found = embed(
            encoder, timed, Path(output) / "out", check=0, batch_size=BATCH, workers=workers
        )
    return found.images_per_second


def _embedded_by_ray(encoder: Encoder, timed: Path, actors: int) -> float:
    """Return the images per second after each actor has written its first shard.

    Before that, the actors start: a constant cost of seconds, whatever the number of images.
    """
    done = []

    def progress(images: int, *_: int) -> None:
        if images:
            done.append((images, time.perf_counter()))

    options = {"check": 0, "batch_size": BATCH, "shard_size": BATCH, "progress": progress}
    with TemporaryDirectory() as output:
        embed(encoder, timed, Path(output) / "out", ray="local", ray_actors=actors, **options)
    (first, start), (last, end) = done[actors - 1], done[-1]
    return (last - first) / (end - start)


def _rate(run: Callable[[], object], images: int) -> float:
    start = time.perf_counter()
    run()
    return images / (time.perf_counter() - start)


def _bar(console: Console) -> Progress:
    columns = *Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal)


if __name__ == "__main__":
    sys.exit(main())
