"""A study of seconds: two arms that train a model of three blocks, and one that reduces it."""

from pathlib import Path

import yaml

from benchmarks.studies.plan import load_study
from benchmarks.studies.study import Study
from tests.helpers.tiny_run import OF_RECIPE, SIZES

TINY = {
    "question": "Does a study run?",
    "paper": "nothing of it.",
    "recipe": "clip_tiny",
    "seeds": [0, 1],
    "quality": ["dense.r1", "reduced.contrastive_loss"],
    "references": ["dense"],
    "overrides": {
        "data.train": "emoji_scenes:seed=0,size=48",
        "data.eval": "emoji_scenes:seed=1,size=10",
        "data.vocab_size": 300,
        "data.context_length": 24,
        "optim.batch_size": 8,
        "optim.steps": 3,
        "checkpoint_every": 1,
        "model.overrides": yaml.safe_load(f"{{{SIZES}, {OF_RECIPE['clip_tiny']}}}"),
    },
    "arms": {
        "dense": {"model.overrides.schedule": None},
        "tome": {"model.overrides.strategy": "tome", "at_flops": 0.72},
        "after": {
            "model.overrides.strategy": "random",
            "from": "dense",
            "length": 0,
            "at_flops": [0.61, 0.82],
        },
    },
}


def tiny_study(folder: Path, **changes) -> Study:
    """The study as a file in `folder` holds it; what is given of overrides and arms is added."""
    values = TINY | changes
    for key in ("overrides", "arms"):
        values[key] = TINY[key] | changes.get(key, {})
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_study(path)
