"""Strategies and schedules from hostile text, and the files of `elip calibrate`."""

import json

from elip_models.api import reduce_
from elip_models.strategies import STRATEGIES
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.spec import get_strategy, option_types
from elip_models.towers import as_tower
from tests.fuzz.harness import Loss, kind, refused
from tests.fuzz.hostile_json import change_json
from tests.helpers.towers import plain_vit

NUMBERS = ("0", "-1", "5000", "99999999999", "1e400", "nan", "-inf", "0x_", "2024-99-99", "1.5")
TEXTS = ("", " ", "~", "null", "yes", "\t", "\0", "\udcff", "😀", "٣", "x" * 50_000, "[" * 3_000)
VALUES = (*NUMBERS, *TEXTS, "../../x", "/", "a" * 255, "'", '"', "%", "-", "--", "a\n---\nb")


def mutated(text, rng):
    """Text with a few pieces removed, repeated, moved, or replaced by hostile ones."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(text) + 1), rng.choice((1, 3, 20))
        pieces = rng.choice(VALUES), rng.choice("\n:{}[],&*!|>'\"%@`#?-\t "), text[at:][:9], ""
        text = text[:at] + rng.choice(pieces) + text[at + rng.choice((0, length)) :]
    return text


def refused_shortly(error, *names):
    """`refused`, whose message must be short too."""
    if len(str(error)) > 3000:
        raise Loss(f"a message of {len(str(error))} characters") from error
    return refused(error, *names)


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
    try:
        if rng.random() < 0.3:
            Schedule.parse(rng.choice((groups, value, mutated(groups, rng))))
        else:
            get_strategy(rng.choice(texts))
    except (TypeError, ValueError) as error:
        return refused_shortly(error, "expected")
    return "read"


@kind()
def strategy_files(folder, rng):
    """The files of `elip calibrate`, which `reduce_` reads."""
    model = plain_vit(depth=4)
    strategy = rng.choice(list(STRATEGIES.values()))().with_rate(as_tower(model).size)
    file = folder / "calibrated.json"
    file.write_text(json.dumps({**settings_of(strategy), "calibration": {"images": 9}}))
    change_json(file, rng)
    try:
        reduce_(model, str(file))
    except (TypeError, ValueError) as error:
        return refused_shortly(error)
    return "read"
