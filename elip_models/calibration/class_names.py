"""Names of classes: those of a classifier's head, those of ImageNet, and texts with them.

The names and templates of ImageNet are those of open_clip if it is installed. Otherwise the names
are those of timm, and "a photo of a dog." is the only template.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from torch import nn

from elip_models.towers import library_of
from elip_models.validation import did_you_mean, shortened

Template = Callable[[str], str]
"""A function from the name of a class to a text."""
NEW_HEAD = "LABEL_"
"""How transformers names the classes of a head without names, before the number."""


def with_article(name: str) -> str:
    """Return "a dog" for "dog" and "an owl" for "owl"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def prompt_templates() -> tuple[Template, ...]:
    """Return the templates of ImageNet's classes."""
    if find_spec("open_clip") is None:
        return (_photo_template,)
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(OPENAI_IMAGENET_TEMPLATES)


def _photo_template(name: str) -> str:
    return f"a photo of {with_article(name)}."


def imagenet_names() -> Sequence[str]:
    """Return the names of ImageNet's 1,000 classes, as texts use them."""
    if find_spec("open_clip") is None:
        from timm.data import ImageNetInfo

        texts = ImageNetInfo("imagenet-1k").label_descriptions()
        return [text.partition(",")[0] for text in texts]
    from open_clip import IMAGENET_CLASSNAMES

    return IMAGENET_CLASSNAMES


def names_in_texts(classes: Sequence[str]) -> list[str]:
    """Return the name of each class as a text uses it: WordNet ids get the names of ImageNet."""
    from timm.data import ImageNetInfo

    ids = ImageNetInfo("imagenet-1k").label_names()
    if set(classes) <= set(ids):
        names = dict(zip(ids, imagenet_names(), strict=True))
        return [names[name] for name in classes]
    return [name.replace("_", " ") for name in classes]


def head_classes(model: nn.Module) -> list[tuple[str, ...]] | None:
    """Return the names of each class of a classifier's head, () where it has none.

    Returns:
        A tuple of synonyms for each class, the first of which is shown; None without such a head.
    """
    library = library_of(model)
    if library == "timm":
        return _timm_classes(model)
    if library == "transformers" and "ForImageClassification" in type(model).__name__:
        names = model.config.id2label
        return [_synonyms(names[i]) for i in range(len(names))]
    return None


def _timm_classes(model: nn.Module) -> list[tuple[str, ...]] | None:
    """Return the names that the config stores, or those of the ImageNet of as many classes."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    count = getattr(model, "num_classes", 0)
    if not count or not hasattr(model, "get_classifier"):
        return None
    config = getattr(model, "pretrained_cfg", None) or {}
    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if names and len(names) == count:
        return [(name, *_synonyms(descriptions.get(name, ""))) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [()] * count
    info = ImageNetInfo(subset)
    return [
        (*_synonyms(info.index_to_description(i)), info.index_to_label_name(i))
        for i in range(count)
    ]


def _synonyms(text: str) -> tuple[str, ...]:
    """Return 'tench, Tinca tinca' and each name in it; none for the name of a new head."""
    if not text or text.startswith(NEW_HEAD):
        return ()
    parts = tuple(part.strip() for part in text.split(","))
    return parts if len(parts) == 1 else (*parts, text)


def known_labels(labels: Sequence[str], classes: Sequence[tuple[str, ...]]) -> bool:
    """Return whether most labels name classes of a head, or number all of them."""
    known = {_plain(name) for synonyms in classes for name in synonyms}
    numbers = {str(i) for i in range(len(classes))}
    return 2 * sum(_plain(label) in known for label in labels) > len(labels) or (
        set(labels) == numbers
    )


def class_numbers(labels: Sequence[str], classes: Sequence[tuple[str, ...]]) -> dict[str, int]:
    """Return the number in the head of each class that a label names.

    Args:
        labels: names of classes, without duplicates; or numbers of classes, if all are numbers.
        classes: of `head_classes`.

    Raises:
        ValueError: a label that the head does not know, or that names several of its classes.
    """
    numbers: dict[str, list[int]] = {}
    for i, synonyms in enumerate(classes):
        for name in dict.fromkeys(map(_plain, synonyms)):
            numbers.setdefault(name, []).append(i)
    by_number = all(label.isdecimal() and _plain(label) not in numbers for label in labels)
    found = {}
    for label in labels:
        if by_number:
            fits = [int(label)] if int(label) < len(classes) else []
        else:
            fits = numbers.get(_plain(label), [])
        if not fits:
            known = f"a number below {len(classes)}" if by_number else "a class of the head"
            close = did_you_mean(label, [name for synonyms in classes for name in synonyms])
            raise ValueError(
                f"labels: expected {known}, got {shortened(label)}{'' if by_number else close}; "
                "pass --task probe for classes that the head does not have"
            )
        if len(fits) > 1:
            raise ValueError(
                f"labels: expected a class of the head, got {shortened(label)}, which names the "
                f"classes {', '.join(map(str, fits))}; pass numbers or WordNet ids"
            )
        found[label] = fits[0]
    return found


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()
