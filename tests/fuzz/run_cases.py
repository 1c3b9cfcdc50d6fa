"""Damaged checkpoints, and folders with files of others."""

import json

from elip_models.pretraining.training.run_checkpoints import Checkpoints, step_of
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.saving.files import unfinished
from elip_models.validation import ConfigError, TrainingError
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import damaged
from tests.helpers.tiny_run import tiny_config

NAMES = (
    *("tokenizer/tokenizer.json", "metrics.jsonl", "recipe.yaml", "provenance.jsonl"),
    *("checkpoints/step_00000001/model.safetensors", "model/config.json", "notes.txt", "a/b/c.png"),
)


@kind(share=2)
def checkpoints(folder, rng):
    """Bytes of a file are damaged: the checkpoint before it is used, or the run is refused."""
    run = Checkpoints(folder)
    for step in (1, 2):
        unfinished(run.of(step)).mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
            (unfinished(run.of(step)) / name).write_bytes(rng.randbytes(200))
        run.commit(step, keep=2, num_processes=1)
    path = rng.choice(sorted(run.of(2).iterdir()))
    content = path.read_bytes()
    path.write_bytes(damaged(content, rng))
    if rng.random() < 0.2:
        path.unlink()
    warnings = []
    try:
        newest = run.latest(warnings.append)
        step_of(newest, num_processes=1)
    except TrainingError as error:
        return refused(error, "step_00000002")
    changed = not path.exists() or _value(path.read_bytes()) != _value(content)
    if changed != (newest.name == "step_00000001") or changed != bool(warnings):
        raise Loss(f"{path.name} was {'damaged' * changed or 'whole'}, {newest.name} is used")
    return "reported" if warnings else "read"


def _value(content):
    """What JSON says, for white space in it says nothing; bytes that are none as they are."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


@kind()
def foreign_folders(folder, rng):
    """Files of others in `output_dir` are all there afterwards, with equal bytes."""
    run, config = RunFolder(folder / "run"), tiny_config(folder / "run")
    for name in rng.sample(NAMES, rng.randrange(1, 6)):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text(rng.choice(("", "{}", '{"step": 99}', "name: a", "\0" * 9)))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    try:
        with run.locked(config, resume=rng.random() < 0.5):
            run.prepare()
            run.record_start(config, {"started": "now"})
        outcome = "read"
    except (TrainingError, ConfigError) as error:
        outcome = refused(error, "run")
    for path, content in before.items():
        if not path.exists() or path.read_bytes() != content:
            raise Loss(f"{path.name} was changed")
    return outcome
