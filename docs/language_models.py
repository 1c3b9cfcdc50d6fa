"""Write docs/language_models.md: which multimodal language models of transformers can be reduced.

python docs/language_models.py           # builds a tiny model of each family on the meta device

The checks, and the reasons for their gaps, are those of `tests/vlm/checks.py`.
"""

from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from benchmarks.tables import table
from elip_models.vlm.families import FAMILIES
from elip_models.vlm.retrieval import RETRIEVAL
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategy_list import list_strategies
from elip_models.vlm.unsupported import language_support
from tests.vlm.checks import CHECKS, GAPS
from tests.vlm.configs import CONFIGS, retrieval_model

PAGE = Path(__file__).with_name("language_models.md")


def model_of(family: str) -> torch.nn.Module:
    """Return a model of a family, or of a type for retrieval, on the meta device."""
    with torch.device("meta"):
        if family in RETRIEVAL:
            return retrieval_model(family)
        kind = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
        return kind(CONFIGS.get(family, kind.config_class)())


def strategy_reasons(family: str) -> dict[str, str | None]:
    """Return why each strategy cannot reduce the language model of a family, or None."""
    model = model_of(family)
    reasons = {entry.name: entry.why_unsupported for entry in list_strategies(model)}
    return {name: reasons[name] for name in LANGUAGE_STRATEGIES}


def page() -> str:
    """Return the text of the page."""
    columns = {"before": "diverse", "`visionzip`": "visionzip", "`evs`": "evs", "inside": "fastv"}
    columns |= {"`dedup`": "dedup"}
    notes: list[str] = []

    def cell(reason: str | None) -> str:
        if reason is None:
            return "yes"
        if reason not in notes:
            notes.append(reason)
        return f"no ({notes.index(reason) + 1})"

    rows = []
    for family in sorted(FAMILIES):
        reasons = strategy_reasons(family)
        cells = [reasons[name] for name in columns.values()]
        cells += [GAPS.get((check, family)) for check in CHECKS]
        rows.append([f"`{family}`", *map(cell, cells)])
    of_images = {title: name for title, name in columns.items() if name != "evs"}
    retrieval = [
        [f"`{name}`", *(cell(strategy_reasons(name)[own]) for own in of_images.values())]
        for name in RETRIEVAL
    ]
    support = language_support()
    others = dict.fromkeys(filter(None, support.values()))
    unsupported = [
        f"- {', '.join(f'`{name}`' for name in support if support[name] == reason)}: {reason}."
        for reason in others
    ]
    return "\n".join(
        [
            "# Multimodal language models",
            "",
            "The transformers models whose language model can read fewer image tokens. `elip "
            "models --language` prints the same for the installed version. "
            f"`docs/language_models.py` wrote this page with transformers "
            f"{transformers.__version__}.",
            "",
            "The first columns are [strategies](vlm.md#strategies): before the language model "
            "(`diverse`, `cdpruner` and others), inside it (`fastv`, `pyramid`) or before the "
            "image tower (`dedup`). The others are checks, by tests with tiny random models in "
            "fp64. Each compares the reduced model with the stock model, which reads every token, "
            "but hides the removed ones:",
            "",
            "- **every token**: with `keep=1.0`, logits and generated tokens are the same bits;",
            "- **logits** of a padded batch, and **gradients** with and without checkpointing;",
            "- **generate** with a cache, and again with the cache of the first call, with "
            "**beams**, and with **no cache**;",
            "- **second turn**: three calls with one cache, with text and further images;",
            "- **embeddings** in place of ids.",
            "",
            f"{len(rows)} types are supported.",
            "",
            table(["`model_type`", *columns, *CHECKS], rows, left=1),
            "",
            "## Retrieval",
            "",
            "Models of late interaction. Their embeddings of removed tokens are zeros, which you "
            "[drop before scoring](documents.md#retrieval); the others are compared with the stock "
            "model, which hides the removed ones.",
            "",
            table(["`model_type`", *of_images], retrieval, left=1),
            "",
            "## Reasons",
            "",
            "Some depend on the config: call `elip_models.list_strategies(model)` for your model.",
            "",
            *(f"{i}. {note[0].upper()}{note[1:]}." for i, note in enumerate(notes, 1)),
            "",
            "## Not supported",
            "",
            *unsupported,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
