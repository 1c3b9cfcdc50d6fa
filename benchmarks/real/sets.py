"""The labelled sets of the panel: what they show, where they are, and how they are split.

Each set is a folder of classes. Of each class, the photographs are sorted by the SHA-256 of their
files, and equal files count once. The first `per_class` are measured by cross-fitting: a probe of
the other folds classifies each. The rest is for exploration: settings may be chosen on it. The
groceries have splits of their own, which separate the shops' visits: they are measured by a probe
of the training split.
"""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ENDINGS = (".jpg", ".jpeg", ".png")
FOLDS = 5


class Source(NamedTuple):
    """Where a labelled set comes from.

    Attributes:
        shows: the classes, in words.
        repository: of github.com, whose files the folder contains.
        licence: of the photographs, as their authors state it.
        pattern: the folders of classes in FOLDER, as a glob.
        per_class: the photographs of a class that are measured; None: all.
    """

    shows: str
    repository: str
    licence: str
    pattern: str
    per_class: int | None = None


SOURCES = {
    "clothes": Source(
        "ten easy classes of clothes",
        "alexeygrigorev/clothing-dataset-small",
        "CC0",
        "clothes/*/*",
    ),
    "groceries": Source(
        "81 fine classes of fruit, vegetables and cartons",
        "marcusklasson/GroceryStoreDataset",
        "MIT",
        "groceries",
    ),
    "aerial": Source(
        "seven classes of land in aerial photographs (RSSCN7)",
        "palewithout/RSSCN7",
        "not stated",
        "aerial/*",
        per_class=215,
    ),
    "scenes": Source(
        "fifteen scenes, greyscale (Lazebnik et al. 2006)",
        "jaaumeadrover/Landscape-Image-Classification",
        "not stated",
        "scenes/*/*",
        per_class=100,
    ),
    "textures": Source(
        "ten classes of textures (the first of DTD, Cimpoi et al. 2014)",
        "pan8915/DeepTexture",
        "research",
        "textures/*",
    ),
    "waste": Source(
        "six materials of waste (TrashNet, Yang and Thung 2016)",
        "congduytran12/Trash-Classification-",
        "MIT",
        "waste/*",
        per_class=300,
    ),
    "mri": Source(
        "four findings in magnetic resonance images of the head",
        "KomalChaudhari8/BRAIN_TUMOR_APP",
        "CC0",
        "mri/*/*",
        per_class=375,
    ),
    "objects": Source(
        "101 classes of objects and animals (Caltech 101, Fei-Fei et al. 2004)",
        "taibarehm/CVassimgement",
        "CC BY 4.0",
        "objects/*",
        per_class=20,
    ),
}
HELD_OUT = "objects"
"""Named before any measurement: no setting is chosen on it, and it is measured last."""


class Fold(NamedTuple):
    """Numbers of photographs: a probe is fitted on `train`, tuned on `tune`, and measured."""

    train: Tensor
    tune: Tensor
    test: Tensor


class LabelledSet(NamedTuple):
    """Photographs, the number of the class of each (n,), and the folds whose tests are measured."""

    paths: list[Path]
    labels: Tensor
    folds: list[Fold]

    @property
    def tested(self) -> Tensor:
        """Return the numbers of the measured photographs, fold by fold."""
        return torch.cat([fold.test for fold in self.folds])


def read(folder: Path, name: str, *, explore: bool = False) -> LabelledSet:
    """Return a set of `SOURCES` in the folder of materials.

    Args:
        folder: the materials.
        name: a key of `SOURCES`.
        explore: return the photographs that are not measured; settings may be chosen on them.

    Raises:
        FileNotFoundError: the set is not there.
        ValueError: all its photographs are measured, or it is held out.
    """
    source = SOURCES[name]
    if explore and (name == HELD_OUT or source.per_class is None):
        raise ValueError(f"sets: expected sets with photographs that are not measured, got {name}")
    if not any(folder.glob(source.pattern)):
        raise FileNotFoundError(
            f"folder: expected {source.shows} in {folder / source.pattern}, found none; put the "
            f"files of github.com/{source.repository} there"
        )
    if name == "groceries":
        return _groceries(folder / "groceries")
    paths: list[Path] = []
    classes: list[int] = []
    for label, (_, found) in enumerate(sorted(_by_class(folder, source.pattern).items())):
        chosen = found[: source.per_class]
        if explore:
            chosen = found[len(chosen) : 2 * len(chosen)]
        paths += chosen
        classes += [label] * len(chosen)
    return LabelledSet(paths, torch.tensor(classes), cross_fitted(len(paths)))


def cross_fitted(count: int) -> list[Fold]:
    """Return folds of photographs that are sorted by class: every fifth is of the same fold."""
    fold_of = torch.arange(count) % FOLDS
    folds = []
    for i in range(FOLDS):
        tune = fold_of == (i + 1) % FOLDS
        test = fold_of == i
        train = ~(tune | test)
        folds.append(Fold(train.nonzero()[:, 0], tune.nonzero()[:, 0], test.nonzero()[:, 0]))
    return folds


def _by_class(folder: Path, pattern: str) -> dict[str, list[Path]]:
    """Return the photographs of each class by the digest of their files, without repetitions."""
    classes: dict[str, dict[str, Path]] = defaultdict(dict)
    for directory in sorted(folder.glob(pattern)):
        for path in sorted(directory.glob("*")):
            if path.suffix.lower() in ENDINGS:
                classes[directory.name.lower()].setdefault(
                    sha256(path.read_bytes()).hexdigest(), path
                )
    return {name: [found[digest] for digest in sorted(found)] for name, found in classes.items()}


def _groceries(root: Path) -> LabelledSet:
    paths: list[Path] = []
    classes: list[int] = []
    parts = []
    for split in ("train", "val", "test"):
        rows = [line.split(", ") for line in (root / f"{split}.txt").read_text().splitlines()]
        parts.append(torch.arange(len(paths), len(paths) + len(rows)))
        paths += [root / name for name, *_ in rows]
        classes += [int(fine) for _, fine, _ in rows]
    return LabelledSet(paths, torch.tensor(classes), [Fold(*parts)])


def names(selected: Sequence[str]) -> list[str]:
    """Return names of sets in the order in which they are measured: the one held out is last."""
    return sorted(selected, key=lambda name: (name == HELD_OUT, list(SOURCES).index(name)))
