"""Measure text-image retrieval by reduced features, and guidance by the query.

    python -m benchmarks.real.retrieval FOLDER --tower text_tower.safetensors \
        --captions Flickr8k.token.txt --names SPLIT.txt --settings "tome 0.7, tome 0.5" \
        [--guided "tome 0.52, guided_tome:fusion=0.5,guidance_norm=match 0.5"] --output X.json

Reduced image features are compared with the text features of the tower that
`benchmarks.real.text_tower` trained on dense features.

--guided adds a re-ranking. All images are encoded and ranked under --first. Each query's first
candidates are encoded again under each setting of --guided, with the query as guidance, and are
ranked by these features alone. The guidance is `TextTower.as_cls` of the query's text feature. It
is a CLS feature after the last norm; strategies fuse it with the CLS token that enters an earlier
block.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    check_folder,
    dense_setting,
    measured_on,
    read_settings,
    rows,
    title,
)
from benchmarks.real.measures import retrieved
from benchmarks.real.photographs import batches, photograph_paths
from benchmarks.real.text_tower import (
    TextTower,
    cls_features,
    encode_captions,
    read_captions,
    stored_in,
)
from elip_models.pretraining.tasks.features import ranks_of
from elip_models.saving.files import write_json

SETTINGS = "tome 0.7, resize 0.7, tome 0.5, resize 0.5, evit 0.5, elip 0.5, random 0.5, tome 0.35"


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        document = _document(options, console)
    except (ImportError, OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    for part in (document, document["guided"]):
        if part is not None:
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
    add("--against", default="dense", help="settings to compare with (default: %(default)s)")
    add("--guided", metavar="SETTINGS", help="of the second encoding; compared with the first one")
    add("--first", default="tome 0.5", help="of --settings, ranks first (default: %(default)s)")
    add("--queries", type=int, default=300, help="of --guided (default: %(default)s)")
    add("--candidates", type=int, default=10, help="of a query (default: %(default)s)")
    add("--features", type=Path, metavar="FOLDER", help="read and write CLS features here")
    add("--output", type=Path, metavar="X.json", help="write the results to this file")
    return parser


def _document(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Return the results of all settings, and of the re-ranking."""
    paths = photograph_paths(options.folder, options.names)
    check_folder(options.output)
    captions = read_captions(options.captions, paths)
    tower, model = TextTower.load(options.tower), MODELS["timm"]()
    settings = [dense_setting(model), *read_settings(options.settings, model)]
    second = read_settings(options.guided, model) if options.guided else []
    _check(options, settings, second, len(paths))
    texts = encode_captions(tower, captions)
    stored, guided = stored_in(options.features, options.names), None
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=(len(settings) + len(second)) * len(paths))

        def encode(setting: Setting) -> Tensor:
            found = cls_features(model, setting, paths, stored, partial(bar.advance, task))
            return tower.image_features(found)

        found = {each.text: encode(each) for each in settings}
        if second:
            once = [each for each in settings if each.text in ("dense", options.first)]
            queries = torch.stack([each[0] for each in texts[: options.queries]])
            rankings = {
                each.text: Ranking.of(found[each.text], queries, options.candidates)
                for each in once
            }
            ranking, images = rankings[options.first], torch.cat(list(batches(paths)))
            ranks = {name: each.ranks for name, each in rankings.items()}
            total = len(second) * ranking.candidates.numel()
            advance = partial(bar.advance, bar.add_task("candidates", total=total))
            for each in second:
                if each.summary.strategy.is_guided:
                    again = partial(_guided_features, model, each, tower, ranking, images)
                else:  # an image has the same features for every query
                    again = partial(_features_of, encode(each))
                ranks[each.text] = reranked(ranking, again, advance)
            guided = _guided(options, [*once, *second], ranks, ranking)
    measured = {name: retrieved(each, texts) for name, each in found.items()}
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
        "settings": _compared(settings, measured, options.against.split(", ")),
        "guided": guided,
    }


@torch.no_grad()
def _guided_features(
    model: nn.Module,
    setting: Setting,
    tower: TextTower,
    ranking: Ranking,
    images: Tensor,
    query: int,
    candidates: Tensor,
) -> Tensor:
    """Return the features (k, D) of a query's candidates, encoded with the query as guidance."""
    text = tower.as_cls(ranking.texts[query]).expand(len(candidates), -1)
    strategy = setting.summary.strategy
    tokens = elip_models.encode_image(model, images[candidates], text, strategy=strategy)
    return tower.image_features(tokens[:, 0])


def _features_of(features: Tensor, query: int, candidates: Tensor) -> Tensor:
    return features[candidates]


def _check(
    options: argparse.Namespace,
    settings: Sequence[Setting],
    second: Sequence[Setting],
    images: int,
) -> None:
    """Raise ValueError unless the options name settings, queries and candidates that exist."""
    for against in options.against.split(", "):
        if against not in (each.text for each in settings):
            raise ValueError(f"against: expected some of the settings, got {against!r}")
    if not second:
        return
    first = options.first
    if first not in (each.text for each in settings):
        raise ValueError(f"first: expected one of the settings, got {first!r}")
    if first in (each.text for each in second):
        raise ValueError(f"guided: expected other settings than --first, got {first!r} in both")
    for name in ("queries", "candidates"):
        number = getattr(options, name)
        if not 0 < number <= images:
            raise ValueError(f"{name}: expected 1 to {images}, the photographs, got {number}")


def _guided(
    options: argparse.Namespace,
    settings: Sequence[Setting],
    ranks: dict[str, Tensor],
    ranking: Ranking,
) -> dict[str, Any]:
    """Return the results of the re-ranking.

    The first encodings come first in `settings`. `second_flops` are those of a query's second
    encodings, in forward passes of the dense model.
    """
    values = {
        name: {"r1": (each == 0).double(), "reciprocal_rank": 1 / (each + 1).double()}
        for name, each in ranks.items()
    }
    against, k = options.guided.split(", ")[0].strip(), options.candidates
    once = ("dense", options.first)
    found = _rows(settings, values, against)
    return {
        "first": options.first,
        "queries": options.queries,
        "candidates": k,
        "among_candidates": round((ranking.ranks < k).double().mean().item(), 4),
        "against": against,
        "settings": [
            row
            | {"second_flops": 0.0 if row["setting"] in once else round(k * row["flops"], 4)}
            | _by_text(setting, settings, values)
            for setting, row in zip(settings, found, strict=True)
        ],
    }


def _by_text(
    setting: Setting, settings: Sequence[Setting], values: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Return the differences from the same strategy with fusion=1, if it was measured too."""
    if not setting.summary.strategy.is_guided:
        return {}
    by_image = replace(setting.summary.strategy, fusion=1.0, guidance_norm="none")
    for other in settings:
        if other.summary.strategy == by_image:
            row = _rows([setting], values, other.text)[0]
            return {"by_text": {"against": other.text, "difference": row["difference"]}}
    return {}


def _compared(
    settings: Sequence[Setting], values: dict[str, dict[str, Tensor]], against: Sequence[str]
) -> list[dict[str, Any]]:
    """Return one entry of the results a setting, with its differences from each of `against`."""
    found = [row | {"differences": {}} for row in _rows(settings, values, None)]
    for name in against:
        for row, compared in zip(found, _rows(settings, values, name), strict=True):
            if "difference" in compared:
                row["differences"][name] = compared["difference"]
    return found


def _rows(
    settings: Sequence[Setting], values: dict[str, dict[str, Tensor]], against: str | None
) -> list[dict[str, Any]]:
    """Return one entry of the results a setting, from the values of one set."""
    sets = {text: {name: [each] for name, each in found.items()} for text, found in values.items()}
    return rows(settings, sets, against)


def _table(settings: Sequence[dict[str, Any]]) -> Table:
    """Return means and intervals, and differences below them."""
    measures = [
        name for name, each in settings[0].items() if isinstance(each, dict) and "mean" in each
    ]
    shown = Table("setting", "FLOPs", *measures)
    shown.columns[0].overflow = "fold"
    for row in settings:
        shown.add_row(row["setting"], f"{row['flops']:.2f}", *(_cell(row[n]) for n in measures))
        differences = row.get("differences") or {"": row.get("difference")}
        for against, each in differences.items():
            if each is not None:
                cells = (_cell(each[name], "+") for name in measures)
                shown.add_row(f"  minus {against}".rstrip(), "", *cells)
    return shown


def _cell(interval: dict[str, float], sign: str = "") -> str:
    return f"{interval['mean']:{sign}.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
