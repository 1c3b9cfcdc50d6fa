"""`open_composition` opens a zero-shot compositional benchmark.

    emoji_composition:seed=1,size=200                     built-in, in the form of Winoground
    winoground/examples.jsonl,images=winoground/images
    visual_genome_relation.json,images=vg                 or visual_genome_attribution.json
    coco_order.json,images=coco                           COCO-Order or Flickr30k-Order, dumped
    sugarcrepe/swap_obj.json,images=val2017               or several files
    sugarcrepe,images=val2017                             all JSON files of a folder

The formats of the files are in `composition_files`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from elip_models.pretraining.data.checks import existing_files, expand_user
from elip_models.pretraining.data.data_spec import Spec, built_in_options, parse_files
from elip_models.pretraining.data.tasks.composition_files import (
    CompositionFiles,
    CompositionSource,
)
from elip_models.pretraining.data.tasks.emoji_composition import EmojiComposition
from elip_models.validation import PositiveInt, check, shortened


def open_composition(spec: Spec, *, image_size: int) -> CompositionSource:
    """Open the benchmark that `spec` names, see the top of this file.

    Args:
        spec: One line, or a mapping with the fields of `FileSpec`.
        image_size: Size in pixels of built-in images. Stored images keep their size.

    Raises:
        TypeError, ValueError: The specification or a file is malformed, or has no example.
        FileNotFoundError: A file is missing.
    """
    check("image_size", image_size, PositiveInt)
    if (
        options := built_in_options(spec, EmojiComposition.benchmark, EmojiComposition)
    ) is not None:
        return EmojiComposition(**options, image_size=image_size)
    named = parse_files(spec, ("images",), f"{EmojiComposition.benchmark}:size=200 or files")
    files = [file for part in named.files for file in _expand(part)]
    return CompositionFiles(named, existing_files("spec", files))


def _expand(path: str) -> Iterator[Path]:
    """Yield the JSON files of a folder, or the path itself."""
    plain = expand_user(path)
    if not os.path.isdir(plain):  # false too for a path that is too long
        yield plain
        return
    files = sorted(plain.glob("*.json"))
    if not files:
        got = shortened(path)
        raise FileNotFoundError(f"spec: expected a folder of .json files, got none in {got}")
    yield from files
