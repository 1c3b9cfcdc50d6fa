"""docs/paper.md: each arm of the paper's tables, figures and equations has a valid command."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.studies.plan import load_study
from benchmarks.studies.study import FINETUNE, Run
from elip_models.pretraining.models.registry import FAMILIES, config_of, family_of, inherited_fields
from elip_models.pretraining.training.finetune import recipe_for, recipe_of
from elip_models.pretraining.training.recipe import load_recipe, parse_overrides
from elip_models.pretraining.training.training_data import input_fields
from tests.helpers.programs import parse
from tests.helpers.tiers import slow_except
from tests.project.test_reproduce import PAGE, section

DATA = {"data.train": "train.json", "data.eval": "test.json"}
FINETUNING = DATA | {"data.validation": "dev.json"}
TEXT = ("No Pruning", "Random", "Post", "Learned")
PAPER = {
    "Table 1": [
        *("METER", "METER, EViT", "METER, ELIP"),
        *(
            f"{name}{way}"
            for name in ("ALBEF", "BLIP")
            for way in ("", ", EViT", ", ToMe", ", ELIP")
        ),
        *(
            f"{name}{what}"
            for name in ("METER", "ALBEF", "BLIP")
            for what in (" on Flickr30K", " on COCO", ", reduced in fine-tuning")
        ),
    ],
    "Table 2": ["ALBEF on VQA v2", "METER on VQA v2", "METER on NLVR2"],
    "Table 3": ["ALBEF", "METER"],
    "Table 4": ["BLIP"],
    "Table 5": [
        *(f"ViT-{size}/16{way}" for size in "SB" for way in ("", ", EViT", ", ELIP")),
        "fine-tuning",
    ],
    "Table 6": ["zero-shot", "linear probing"],
    "Table 7": [f"{name}, {way}" for name in ("METER", "BLIP") for way in TEXT],
    "Table 8": [
        "2(100%) 2(90%) 6(85%) 2(40%)",
        "6(100%) 6(40%)",
        "2(100%) 2(90%) 8(55%)",
        "4(100%) 4(50%) 4(50%)",
        "2(100%) 2(90%) 6(65%) 2(40%)",
        "2(100%) 2(90%) 6(40%) 2(40%)",
    ],
    "Table 9": ["METER, 364", "METER, 544", "ALBEF, 404", "ALBEF, 584", "BLIP, 424", "BLIP, 564"],
    "Table 10": [
        f"{name}, {way}" for name in ("ALBEF", "BLIP") for way in ("Base", "AMP", "Adapter", "LoRA")
    ],
    "Figure 1": ["attention"],
    "Figure 2": ["concentration of the attention", "cost of each component"],
    "Figure 3": [
        *("merging", "pruning", "λ = 0, text only", "λ = 0.5", "λ = 0.8", "λ = 1, image only")
    ],
    "Figure 4": ["kept patches"],
    "Equation 1": ["fused CLS token"],
    "Equation 2": ["scoring pass, in the code of ELIP", "scoring pass, the same tokens for less"],
    "Equation 3": ["retaining ratios"],
    "Equation 4": ["merging", "pruning only"],
}
"""The arms of the paper by table, figure or equation. Nothing is ever removed from this list."""


def arms():
    """Return the commands of the page by arm, for each table, figure or equation."""
    values = dict(
        re.findall(r"^export (\w+)=['\"]((?:model|retrieval).*).$", PAGE.read_text(), re.MULTILINE)
    )
    found = {}
    for item in PAPER:
        is_equation = item.startswith("Equation")
        code = section("Equations" if is_equation else item).partition("```bash\n")[2]
        full = re.split(r"^# tiny|^```", code, flags=re.MULTILINE)[0].replace("\\\n", " ")
        for command, arm in re.findall(r"^(.*\S) +# (.+)$", full, re.MULTILINE):
            if is_equation:
                equation, _, arm = arm.partition(": ")
                if equation != item:
                    continue
            assert arm not in found.setdefault(item, {}), (item, arm)
            for name, value in values.items():
                command = command.replace(f"${name} ", f"{value} ")
            found[item][arm] = command
    return found


def words_of(command):
    """Return the words of a command for one process, without its data and its folder."""
    words = shlex.split(re.sub(r"^run[48] ", "elip ", command))
    return [
        word for word in words if not word.startswith(("data.", "finetune.", "output_dir=", "$"))
    ]


def checked_model(config):
    """Return the config of the model that a recipe trains; an option that is gone raises."""
    family, values = family_of(config.model.name, config.task), vars(config_of(config.model.name))
    if config.task is not None:
        values = inherited_fields(family, values)
    return family.config_class.from_dict(
        values | input_fields(config.data) | config.model.overrides
    )


def resolved(command):
    """Return the recipe and the model that a command trains, or the values that it was given."""
    words = words_of(command)
    context = parse(words)
    given = context.params
    if words[:2] == ["elip", "train"]:
        own = [f"{key}={value}" for key, value in DATA.items()]
        config = load_recipe(given["recipe"], [*own, *given["overrides"]])
    elif words[:2] == ["elip", "finetune"]:
        family = FAMILIES[given["task"].split("_")[1]]
        recipe = recipe_of(f"finetune/{given['task']}", family)
        base = vars(
            config_of(f"elip_{family.family}" if family.family != "clip" else "clip_vit_b16")
        )
        overrides = FINETUNING | parse_overrides(given["overrides"], "optim.lr=1e-4")
        config = recipe_for(recipe, family, base, Path("run"), overrides, reduced=given["reduced"])
    elif "benchmarks.studies" in words:
        own = DATA | {f"{FINETUNE}{key}": value for key, value in FINETUNING.items()}
        study = load_study(given["name"], own)
        config = study.config(Run(given["only"], 0))
        assert checked_model(study.finetuning(Run(given["only"], 0)))
    else:
        return given
    return replace(config, name="arm", output_dir="runs/arm"), checked_model(config)


def test_the_page_has_every_arm_of_the_paper():
    assert {item: list(found) for item, found in arms().items()} == PAPER


LONGEST = {"Table 7", "Table 8", "Figure 3"}


@pytest.mark.parametrize("item", slow_except(PAPER.keys() - LONGEST, PAPER))
def test_the_commands_of_the_arms_are_valid_and_differ(item):
    settings = {command: resolved(command) for command in arms()[item].values()}
    values = list(settings.values())
    assert all(ours not in values[:i] for i, ours in enumerate(values)), settings.keys()


@pytest.mark.parametrize("arm", ["METER, Learned", "BLIP, Random", "BLIP, No Pruning"])
def test_an_arm_of_table_7_reduces_texts_as_it_says(arm):
    _, model = resolved(arms()["Table 7"][arm])
    name = arm.partition(", ")[2].lower()
    assert model.text_reduction == (None if name == "no pruning" else name)
    assert model.text_drop == 0.4


def test_the_schedules_of_table_8_are_those_of_their_arms():
    for schedule, command in arms()["Table 8"].items():
        assert str(resolved(command)[1].reduction.schedule) == schedule
