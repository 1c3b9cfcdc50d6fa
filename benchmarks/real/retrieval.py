"""Measure text-image retrieval by reduced features, and guidance by the query.

    python -m benchmarks.real.retrieval FOLDER --tower text_tower.safetensors \
        --captions Flickr8k.token.txt --names SPLIT.txt --settings "tome 0.7, tome 0.5" \
        --output X.json
    python -m benchmarks.real.retrieval FOLDER .. --output X.json --first "tome 0.5" \
        --guided "tome 0.5, guided_tome:fusion=0.5,guidance_norm=match 0.5"

The first command compares reduced image features with the text features of the tower that
`benchmarks.real.text_tower` trained on dense features. The second adds a re-ranking to X.json: all
images are encoded and ranked under --first, then each query's first candidates are encoded again
under each setting of --guided, with the query as guidance, and ranked by these features alone.

The guidance of a query is `TextTower.as_cls` of its text feature. It is a CLS feature after the
last norm, and strategies fuse it with the CLS token that enters an earlier block.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import elip_models
from benchmarks.real.dinov2 import MODELS
from benchmarks.real.evaluation import (
    Setting,
    Values,
    check_folder,
    features,
    measured_on,
    read_settings,
    rows,
    title,
)
from benchmarks.real.measures import retrieved
from benchmarks.real.photographs import batches, photograph_paths
from benchmarks.real.text_tower import TextTower, encode_captions, read_captions
from elip_models.models.io.files import read_object, write_json
from elip_models.tasks.features import ranks_of

SETTINGS = "tome 0.7, resize 0.7, tome 0.5, resize 0.5, evit 0.5, elip 0.5, random 0.5, tome 0.35"
DENSE = "dense"
RANKS = ("r1", "reciprocal_rank")


class Ranking(NamedTuple):
    """The queries of a re-ranking, and what the first ranking gives for them.

    texts: (Q, D) text features, of one caption of each of the first Q images.
    ranks: (Q,) ranks of the right image among all, from 0.
    candidates: (Q, k) the first k images.
    """

    texts: Tensor
    ranks: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, images: Tensor, texts: Tensor, k: int) -> "Ranking":
        """Rank image features (n, D) for text features (Q, D); image i is right for text i."""
        similarity = texts @ images.T
        relevant = torch.arange(len(images)) == torch.arange(len(texts))[:, None]
        return cls(texts, ranks_of(similarity, relevant), similarity.topk(k).indices)


def reranked(
    ranking: Ranking, encode: Callable[[int, Tensor], Tensor], advance: Callable[[int], object]
) -> Tensor:
    """Return the ranks (Q,) of the right images after the candidates are ranked again.

    A query keeps its rank if its image is not among its candidates, which are then not encoded.

    Args:
        ranking: the first ranking.
        encode: gives normalised features (k, D) from a query and its candidates (k,).
        advance: called with the candidates of each query.
    """
    ranks = ranking.ranks.clone()
    for query, candidates in enumerate(ranking.candidates):
        relevant = candidates == query
        if relevant.any():
            similarity = encode(query, candidates) @ ranking.texts[query]
            ranks[query] = ranks_of(similarity[None], relevant[None])[0]
        advance(len(candidates))
    return ranks


@torch.no_grad()
def second_ranks(
    model: nn.Module,
    setting: Setting,
    tower: TextTower,
    ranking: Ranking,
    images: Sequence[Tensor],
    advance: Callable[[int], object],
) -> Tensor:
    """Return the ranks (Q,) after a second encoding of the candidates under a setting.

    A setting without guidance gives the same features for every query, so that each image is
    encoded only once here.
    """
    total, strategy = ranking.candidates.numel(), setting.summary.strategy
    if not strategy.is_guided:
        found = features(model, images, setting.summary, lambda _: None).cls
        found = tower.image_features(found)
        ranks = reranked(ranking, lambda _, candidates: found[candidates], lambda _: None)
        advance(total)
        return ranks
    pixels, guides = torch.cat(list(images)), tower.as_cls(ranking.texts)

    def encode(query: int, candidates: Tensor) -> Tensor:
        text = guides[query].expand(len(candidates), -1)
        tokens = elip_models.encode_image(model, pixels[candidates], text, strategy=strategy)
        return tower.image_features(tokens[:, 0])

    return reranked(ranking, encode, advance)


def rank_measures(ranks: Tensor) -> dict[str, list[Tensor]]:
    """Return (Q,) each of `RANKS`, for one set of queries."""
    return {"r1": [(ranks == 0).double()], "reciprocal_rank": [1 / (ranks + 1).double()]}


def retrieval(
    model: nn.Module,
    settings: Sequence[Setting],
    tower: TextTower,
    texts: Sequence[Tensor],
    images: Sequence[Tensor],
    advance: Callable[[int], object],
) -> dict[str, Values]:
    """Return the values of `measures.retrieved` by setting."""
    values = {}
    for setting in settings:
        torch.manual_seed(0)  # of strategies that draw
        found = features(model, images, setting.summary, advance).cls
        measured = retrieved(tower.image_features(found), texts)
        values[setting.text] = {name: [each] for name, each in measured.items()}
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        document = _run(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    part = document["guided"] if options.guided else document
    console.print(_table(part["settings"]))
    if options.output is not None:
        write_json(options.output, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real.retrieval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", type=Path, help="a folder of JPEG or PNG files")
    add("--tower", type=Path, required=True, help="the file of benchmarks.real.text_tower")
    add("--captions", type=Path, required=True, help="lines 'NAME#NUMBER<tab>caption'")
    add("--names", type=Path, help="a file with the names to use, one a line")
    add("--settings", default=SETTINGS, help="strategies and keep (default: %(default)s)")
    add("--against", default=DENSE, help="differences from this setting (default: %(default)s)")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    add("--guided", metavar="SETTINGS", help="add a re-ranking under these settings to --output")
    add("--first", default="tome 0.5", help="ranks candidates (default: %(default)s)")
    add("--queries", type=int, default=300, help="of --guided (default: %(default)s)")
    add("--candidates", type=int, default=10, help="of a query (default: %(default)s)")
    return parser


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results, or those of --output with a re-ranking."""
    paths = photograph_paths(options.folder, options.names)
    check_folder(options.output)
    captions = read_captions(options.captions, paths)
    tower, model = TextTower.load(options.tower), MODELS["timm"]()
    texts = encode_captions(tower, captions)
    document = None
    if options.guided:
        if options.output is None:
            raise ValueError("guided: expected --output, the results to add to, got none")
        document = read_object(options.output)
        _check_numbers(options, len(paths))
    with Progress(console=console, disable=not console.is_terminal) as bar:
        if document is not None:
            return document | {"guided": _guided(options, model, tower, texts, paths, bar)}
        settings = _with_dense(model, options.settings)
        _check_against(options.against, settings)
        images = list(batches(paths))
        task = bar.add_task("images", total=len(settings) * len(paths))
        values = retrieval(model, settings, tower, texts, images, partial(bar.advance, task))
    names = "\n".join(path.name for path in paths)
    return {
        **measured_on("timm"),
        "model": title("timm"),
        "photographs": {
            "names": options.names.name if options.names else None,
            "images": len(paths),
            "captions": sum(len(each) for each in captions),
            "sha256": hashlib.sha256(names.encode()).hexdigest(),
        },
        "text_tower": hashlib.sha256(options.tower.read_bytes()).hexdigest(),
        "against": options.against,
        "settings": rows(settings, values, options.against),
    }


def _with_dense(model: nn.Module, text: str) -> list[Setting]:
    return [
        Setting(DENSE, model, elip_models.reduction_summary(model)),
        *read_settings(text, model),
    ]


def _check_against(against: str, settings: Sequence[Setting]) -> None:
    if against not in (each.text for each in settings):
        raise ValueError(f"against: expected one of the settings, got {against!r}")


def _check_numbers(options: argparse.Namespace, images: int) -> None:
    for name in ("queries", "candidates"):
        number = getattr(options, name)
        if not 0 < number <= images:
            raise ValueError(f"{name}: expected 1 to {images}, the photographs, got {number}")


def _guided(
    options: argparse.Namespace,
    model: nn.Module,
    tower: TextTower,
    texts: Sequence[Tensor],
    paths: Sequence[Path],
    bar: Progress,
) -> dict[str, Any]:
    """Return the results of a re-ranking."""
    dense, first = _with_dense(model, options.first)
    settings = read_settings(options.guided, model)
    _check_against(options.against, [dense, first, *settings])
    images = list(batches(paths))
    queries = torch.stack([each[0] for each in texts[: options.queries]])
    total = 2 * len(paths) + len(settings) * options.queries * options.candidates
    advance = partial(bar.advance, bar.add_task("encodings", total=total))
    rankings = {
        each.text: Ranking.of(
            tower.image_features(features(model, images, each.summary, advance).cls),
            queries,
            options.candidates,
        )
        for each in (dense, first)
    }
    ranking = rankings[first.text]
    values = {text: rank_measures(each.ranks) for text, each in rankings.items()}
    for setting in settings:
        ranks = second_ranks(model, setting, tower, ranking, images, advance)
        values[setting.text] = rank_measures(ranks)
    used = {each.text: each for each in (dense, first, *settings)}
    found = rows(list(used.values()), values, options.against)
    second = {each.text for each in settings}
    return {
        **measured_on("timm"),
        "first": options.first,
        "queries": options.queries,
        "candidates": options.candidates,
        "found": round((ranking.ranks < options.candidates).double().mean().item(), 4),
        "against": options.against,
        "settings": [
            row | {"second_flops": _second_flops(row, options.candidates, second)} for row in found
        ],
    }


def _second_flops(row: dict[str, Any], candidates: int, second: set[str]) -> float:
    """Return what the second encodings of a query cost, in encodings by the dense model."""
    return round(row["flops"] * candidates, 4) if row["setting"] in second else 0.0


def _table(settings: Sequence[dict[str, Any]]) -> Table:
    """Return means and intervals, and differences below them."""
    measures = [name for name, each in settings[0].items() if isinstance(each, dict)]
    measures = [name for name in measures if name != "difference"]
    shown = Table("setting", "FLOPs", *measures)
    shown.columns[0].overflow = "fold"
    for row in settings:
        shown.add_row(row["setting"], f"{row['flops']:.2f}", *(_cell(row[n]) for n in measures))
        if "difference" in row:
            shown.add_row("", "", *(_cell(row["difference"][n], "+") for n in measures))
    return shown


def _cell(interval: dict[str, float], sign: str = "") -> str:
    return f"{interval['mean']:{sign}.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
