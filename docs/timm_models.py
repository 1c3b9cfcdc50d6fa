"""Write docs/timm_models.md: which ViT-like timm models can be reduced, and why others cannot.

python docs/timm_models.py           # builds every model on the meta device: a few minutes

The script creates every model of the modules below with less than 500 M parameters by
`timm.create_model(name)`, and checks every strategy on it. If an error names a flag of
`create_model`, it checks the model once more with that flag.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import timm

from elip_models.analysis.supported_models import TimmSupport, timm_support

PAGE = Path(__file__).with_name("timm_models.md")
MODULES = (
    *("vision_transformer", "deit", "eva", "vision_transformer_hybrid", "vitamin"),
    *("beit", "cait", "convit", "crossvit", "deepseek_vit", "gemma4_vit", "naflexvit", "pit"),
    *("qwen3_vit", "tnt", "vision_transformer_relpos", "vision_transformer_sam", "volo", "xcit"),
)
LARGEST = 500  # million parameters
WORKS, UNSUPPORTED, LARGE = (
    "Supported",
    "Not supported",
    f"More than {LARGEST} M parameters, not tested",
)


class Answer(NamedTuple):
    """The place of a name on the page, and why some strategies do not work.

    heading, kind: its two headings. module: of timm. notes: one reason per strategy.
    """

    heading: str
    kind: str
    module: str
    notes: tuple[str, ...] = ()


def names() -> list[tuple[str, str]]:
    """Return all names and their modules, in the order of `MODULES`."""
    return [(name, module) for module in MODULES for name in timm.list_models(module=module)]


def answer(name: str, module: str) -> Answer:
    """Return the answer for the model that `timm.create_model(name)` returns."""
    found = timm_support(name)
    if found.parameters >= LARGEST * 10**6:
        return Answer(LARGE, "", module)
    if found.refusal is not None:
        return Answer(UNSUPPORTED, f"{found.refusal[0].upper()}{found.refusal[1:]}", module)
    return _supported(found, module)


def _supported(found: TimmSupport, module: str) -> Answer:
    """Return how the model pools, and what does not work."""
    kind = f"Pooling: {found.pooling}"
    failures = {name: reason for name, reason in found.reasons.items() if reason is not None}
    if failures:
        kind += f"; not by {', '.join(f'`{name}`' for name in failures)}"
    notes = tuple(f"`{name}`: {reason}" for name, reason in failures.items())
    return Answer(f"{WORKS} with `{found.flag}`" if found.flag else WORKS, kind, module, notes)


def page(answers: dict[str, Answer]) -> str:
    """Return the text of the page."""
    listed = ", ".join(f"`{module}`" for module in MODULES)
    lines = [
        "# timm models",
        "",
        f"The timm ViTs that can be reduced, as `docs/timm_models.py` tested them with timm "
        f"{timm.__version__}: every name of the modules {listed}, created by "
        "`timm.create_model(name)`. Hierarchical models (Swin, Hiera, MViT, PVT, LeViT and others) "
        "and convolutional models are not supported and not listed. In towers without a class "
        "token, `elip` needs a text as guidance.",
        "",
        "Reasons why a strategy does not work:",
        "",
        *sorted({f"- {note}." for each in answers.values() for note in each.notes}),
    ]
    headings = sorted({each.heading for each in answers.values()}, key=_rank)
    for heading in headings:
        chosen = {name: each for name, each in answers.items() if each.heading == heading}
        lines += ["", f"## {heading}: {len(chosen)}", *_by_kind(chosen)]
    return "\n".join(lines) + "\n"


def _rank(heading: str) -> tuple[bool, ...]:
    return heading == LARGE, heading == UNSUPPORTED, heading != WORKS


def _by_kind(answers: dict[str, Answer]) -> Iterable[str]:
    """Yield a paragraph for each kind, with a line for each module."""
    kinds: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, each in answers.items():
        kinds[each.kind][each.module].append(name)
    for kind, modules in kinds.items():
        yield from ("", *([f"### {kind}", ""] if kind else []))
        for module, found in modules.items():
            yield f"- {module}: {', '.join(f'`{name}`' for name in found)}"


def read(text: str) -> dict[str, Answer]:
    """Return the answers on a page by name, without notes."""
    answers, heading, kind = {}, "", ""
    for line in text[text.index("\n## ") :].splitlines():
        if line.startswith("## "):
            heading, kind = line[3:].rpartition(":")[0], ""
        elif line.startswith("### "):
            kind = line[4:]
        elif line.startswith("- "):
            module, _, found = line[2:].partition(": ")
            answers |= dict.fromkeys(re.findall("`(.+?)`", found), Answer(heading, kind, module))
    return answers


def main() -> None:
    """Write the page."""
    answers = {}
    for name, module in names():
        answers[name] = answer(name, module)
        sys.stderr.write(f"{name}: {answers[name].heading}\n")
    PAGE.write_text(page(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
