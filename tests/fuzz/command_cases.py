"""Command lines, recipes, studies and strategies: mutated text, absurd numbers, hostile files."""

import os
import re
from importlib import import_module

import yaml

from benchmarks.studies.plan import load_study, plan
from elip_models.cli import COMMANDS, load_command
from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.recipe import load_recipe, recipe_names, save_recipe
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import STRATEGIES
from elip_models.reduction.strategy_spec import get_strategy, option_types
from elip_models.validation import ConfigError
from tests.fuzz.harness import Loss, command, kind, refused
from tests.helpers.damage import picture
from tests.helpers.study_case import TINY
from tests.helpers.tiny_run import tiny_arguments

for _name in (  # what commands import lazily, so that no case has to
    *("elip_models.pretraining.training.trainer", "elip_models.pretraining.training.finetune"),
    *("elip_models.profiling.max_batch", "elip_models.analysis.pictures", "matplotlib.figure"),
    *("elip_models.towers.timm", "elip_models.towers.open_clip", "elip_models.towers.hf"),
    *(
        "elip_models.pretraining.tasks.registry",
        "elip_models.pretraining.checkpoints.export",
        "datasets",
        "peft",
    ),
):
    import_module(_name)
for _command in COMMANDS:
    load_command(_command)
NUMBERS = ("0", "-1", "5000", "99999999999", "1e400", "nan", "-inf", "0x_", "2024-99-99", "1.5")
VALUES = (
    *NUMBERS,
    *("", " ", "~", "null", "yes", "!!int foo", "!!binary =", "&a [*a]", "<<: *a", "\t", "\0"),
    *(
        "\udcff",
        "😀",
        "٣",
        "x" * 300,
        "x" * 50_000,
        "[" * 3_000,
        "{a: " * 3_000,
        "a: &a",
        "[1, [2]]",
    ),
    *(
        "{a: 1, a: 2}",
        "{1: 2}",
        "? [a]",
        "../../x",
        "/",
        ".",
        "..",
        "~nouser/x",
        "missing/a",
        "file",
    ),
    *(
        "folder",
        "pipe",
        "picture.png",
        "link",
        "a" * 255,
        "'",
        '"',
        "%",
        "---\n",
        "a\n---\nb",
        "-",
        "--",
    ),
)
STUDY = ["python", "-m", "benchmarks.studies"]
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


def place_files(folder):
    """Files that arguments name: a file, a folder, a pipe without writer, an image, and a link."""
    (folder / "file").write_bytes(b"\xff\x00[{")
    (folder / "folder").mkdir()
    (folder / "picture.png").write_bytes(picture())
    (folder / "link").symlink_to("link")
    os.mkfifo(folder / "pipe")


def mutated(text, rng):
    """Text with a few pieces removed, repeated, moved, or replaced by hostile ones."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(text) + 1), rng.choice((1, 3, 20))
        piece = rng.choice(
            (rng.choice(VALUES), rng.choice("\n:{}[],&*!|>'\"%@`#?-\t "), text[at:][:9])
        )
        text = text[:at] + rng.choice((piece, "")) + text[at + rng.choice((0, length)) :]
    return rng.choice((text, text, text, BOMB + text, text + "\n" + BOMB))


def hostile(values, rng):
    """A mapping, of mappings, with one value or key replaced by a hostile one."""
    values = dict(values)
    key = rng.choice(sorted(values, key=str))
    if isinstance(values[key], dict) and values[key] and rng.random() < 0.7:
        return values | {key: hostile(values[key], rng)}
    kinds = (
        None,
        True,
        -1,
        2**70,
        1e300,
        [],
        {},
        [[1]],
        {"a": [{}]},
        rng.choice(VALUES),
        [values[key]],
    )
    return rng.choice(({**values, key: rng.choice(kinds)}, {**values, rng.choice(VALUES): 1}))


@kind(share=2)
def recipes(folder, rng):
    place_files(folder)
    overrides = []
    name = rng.choice(recipe_names())
    config = load_recipe(name, ["data.train=a.json"])
    save_recipe(config, folder / "own.yaml")
    text = (folder / "own.yaml").read_text()
    if rng.random() < 0.4:
        text = mutated(text, rng)
    elif rng.random() < 0.6:
        text = yaml.safe_dump(hostile(yaml.safe_load(text), rng))
    (folder / "own.yaml").write_text(text, errors="surrogateescape")
    for _ in range(rng.randrange(4)):
        sections = rng.choice(
            (("seed",), ("optim", "lr"), ("model", "overrides", "a"), ("data", "train"))
        )
        key = rng.choice((".".join(sections), ".".join(sections), rng.choice(VALUES)))
        overrides.append(f"{key}={rng.choice(VALUES)}")
    try:
        found = load_recipe(folder / "own.yaml", overrides)
    except ConfigError as error:
        if len(str(error)) > 3000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error)
    save_recipe(found, folder / "again.yaml")
    if load_recipe(folder / "again.yaml") != found:
        raise Loss("a recipe that is written reads differently")
    return "read"


@kind(share=2)
def studies(folder, rng):
    place_files(folder)
    text = yaml.safe_dump(TINY, sort_keys=False)
    if rng.random() < 0.5:
        text = mutated(text, rng)
    else:
        text = yaml.safe_dump(hostile(TINY, rng), sort_keys=False)
    (folder / "own.yaml").write_text(text, errors="surrogateescape")
    options = rng.choice(([], ["--seeds", rng.choice(VALUES)], ["--only", rng.choice(VALUES)]))
    if rng.random() < 0.3:
        return command([*STUDY, "own.yaml", "--dry-run", *options])
    try:
        study = load_study(folder / "own.yaml")
        for run in plan(study)[:4]:
            if not study.folder(run).resolve().is_relative_to(folder / "runs" / "studies"):
                raise Loss(f"{study.folder(run)} is outside of the runs")
            study.config(run)
    except ConfigError as error:
        if len(str(error)) > 3000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error)
    return "read"


@kind(share=2)
def strategies(folder, rng):
    name = rng.choice(sorted(STRATEGIES))
    key = rng.choice([*option_types(name), "x"])
    groups = " ".join(
        f"{rng.choice((1, 2, 10**6))}({rng.choice((100, 50, 0, 1e-9))}%)" for _ in range(3)
    )
    many = rng.choice((1, 1, 10**5))
    value = rng.choice((rng.choice(VALUES), groups * many, "1," * many, "(" * many))
    texts = (
        f"{name}:{key}={value}",
        f"{name}:" + f"{key}=1," * many,
        mutated(f"{name}:{key}=1", rng),
    )
    text = rng.choice(texts)
    try:
        if rng.random() < 0.3:
            Schedule.parse(rng.choice((groups, value, mutated(groups, rng))))
        else:
            get_strategy(text)
    except (TypeError, ValueError) as error:
        if len(str(error)) > 3000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error, "expected")
    return "read"


SCENES = "emoji_scenes:size=3"
MODEL = "MODEL"  # stands for the folder of a saved model
COMMANDS = [
    each.split()
    for each in (
        f"eval retrieval --model MODEL --data {SCENES} --batch-size 2 --num-workers 0",
        f"eval retrieval --model MODEL --data {SCENES} --max-bad-share 0.1 --output a.json",
        f"eval retrieval --model MODEL --data {SCENES} --rerank 2",
        "eval zero-shot --model MODEL --data emoji_classes:size=6 --output a.json",
        "eval composition --model MODEL --data emoji_composition:size=3 --guided --batch-size 2",
        "python -m benchmarks.selection --model MODEL --batch-size 2 --strategy random --count 2"
        f" --data {SCENES}",
        "eval vqa --model MODEL --data emoji_questions:size=3 --set candidates=4",
        "visualize --model MODEL --image picture.png --caption a --output a.png --keep 0.7",
        f"visualize --model MODEL --data {SCENES} --count 2 --schedule 3(50%)",
        "visualize --model MODEL --image picture.png --caption a --strategy tome",
        "profile --model MODEL --strategy tome --flops-only --batch-size 2 --output a.json",
        "profile --model MODEL --strategy tome --rounds 1 --batch-size 2 --mode inference",
        "profile --model MODEL --strategy evit --flops-only --flops 0.8 --dtype bf16",
        "profile --model MODEL --strategy tome --max-batch --memory 1GB",
        "python -m benchmarks.studies own.yaml --dry-run --only dense --seeds 0,1 --results a.json",
        "python -m benchmarks.studies own.yaml --results file --page a.md",
        f"data check {SCENES} --limit 2 --image-size 32 --task retrieval",
        "data check emoji_questions:size=3 --task vqa --image-size 32",
        "finetune vqa_tiny --from MODEL optim.steps=1 data.train=emoji_questions:size=9",
    )
]
TRAINING = [*tiny_arguments("out"), "optim.steps=1"]


def save_model(folder):
    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    sizes = TINY["overrides"]["model.overrides"]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = create_model("clip_tiny", vocab_size=len(tokenizer), **sizes, **ends)
    model.save_pretrained(folder, tokenizer=tokenizer)
    command(["profile", "--model", str(folder), "--strategy", "tome", "--flops-only"])  # imports


@kind(share=3, prepare=save_model)
def commands(folder, rng, prepared):
    place_files(folder)
    (folder / "own.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    arguments = list(rng.choice([*COMMANDS, *COMMANDS, TRAINING]))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(3 if arguments[0] == "python" else 1, len(arguments))
        name, equals, value = arguments[at].partition("=")
        hostile_value = rng.choice((rng.choice(VALUES), rng.choice(NUMBERS), mutated(value, rng)))
        if arguments[at].startswith("--"):
            is_flag = arguments[at + 1 :][:1] == [] or arguments[at + 1].startswith("--")
            end = at + 1 if is_flag else at + 2
            arguments[at:end] = arguments[at:end] * rng.choice((0, 0, 2))
            arguments += rng.choice(([], [], [], [rng.choice(VALUES)]))
        else:
            arguments[at] = f"{name}={hostile_value}" if equals else hostile_value
    arguments = [re.sub(r"size=\d{3,}", "size=99", each) for each in arguments]  # long, rightly
    if arguments[:3] == STUDY:
        arguments += ["--dry-run"]
    if arguments[0] == "profile":
        arguments += ["--flops-only"]
        arguments += [] if "--strategy" in arguments else ["--strategy", "tome"]  # not all
    for i in range(len(arguments) - 1):  # a file outside of the folder, rightly
        if arguments[i] == "--output":
            arguments[i + 1] = arguments[i + 1].replace("../", "")
    return command([str(prepared) if each == MODEL else each for each in arguments])
