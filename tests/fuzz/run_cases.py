"""Damaged checkpoints, and folders with other files or a damaged run."""

import json

import torch
from accelerate import Accelerator

from elip_models.pretraining.training.restore import restore_
from elip_models.pretraining.training.run_checkpoints import (
    STATE_FILE,
    Checkpoints,
    _digest,
    step_of,
)
from elip_models.pretraining.training.run_folder import RunFolder
from elip_models.validation import ConfigError, TrainingError
from tests.fuzz.harness import Loss, kind, refused
from tests.helpers.damage import damaged
from tests.helpers.tiny_run import tiny_config

ROWS = 12  # of a log
VALUES = (None, True, -1, 0, 2**70, 0.5, float("nan"), "", "x" * 200, [], [[]], {}, {"a": None})
NAMES = (
    *("tokenizer/tokenizer.json", "metrics.jsonl", "recipe.yaml", "provenance.jsonl", ".lock"),
    *(".tokenizer/vocab.json", "checkpoints/step_00000001/model.safetensors", "model/config.json"),
    *("checkpoints/.step_00000002/a", "notes.txt", "a/b/c.png", ".hidden", "tensorboard/events"),
)


class Restored:
    """A model, an optimiser and random states, as a run saves and loads them."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.load = self.accelerator.load_state

    def save(self, folder):
        self.model(torch.rand(2, 3)).sum().backward()
        self.optimizer.step()
        self.accelerator.save_state(str(folder))


def save_checkpoints(folder):
    """Two checkpoints of equal content but for their step."""
    found, run = Checkpoints(folder / "checkpoints"), Restored()
    for step in (1, 2):
        found.unfinished(step).mkdir(parents=True)
        run.save(found.unfinished(step))
        found.commit(step, keep=2, num_processes=1)


def copy_tree(source, target):
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        copy.mkdir(parents=True) if path.is_dir() else copy.write_bytes(path.read_bytes())


@kind(share=2, prepare=save_checkpoints)
def checkpoints(folder, rng, prepared):
    """Bytes of a file are damaged: the checkpoint before it is used."""
    copy_tree(prepared, folder)
    found = Checkpoints(folder / "checkpoints")
    path = rng.choice(sorted((found.path / "step_00000002").iterdir()))
    content = path.read_bytes()
    path.write_bytes(damaged(content, rng))
    if rng.random() < 0.2:
        path.unlink()
    told = []
    newest = found.latest(told.append)
    changed = not path.exists() or _value(path.read_bytes()) != _value(content)
    if changed != (newest.name == "step_00000001") or changed != bool(told):
        raise Loss(f"{path.name} was {'damaged' * changed or 'whole'}, {newest.name} is used")
    restore_(Restored(), newest)
    return "reported" if told else "read"


def _value(content):
    """What JSON says, for white space in it says nothing; bytes that are none as they are."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return content


@kind(share=2, prepare=save_checkpoints)
def signed_checkpoints(folder, rng, prepared):
    """A value of a file has another kind, and the manifest fits: it is refused."""
    copy_tree(prepared, folder)
    found = Checkpoints(folder / "checkpoints")
    newest = found.path / "step_00000002"
    rng.choice((_change_manifest, _change_saved, _change_saved))(newest, rng)
    told = []
    latest = found.latest(told.append)
    if latest.name == "step_00000001":
        return "reported" if told else _loss("an older one is used without a word")
    try:
        step_of(latest, num_processes=1)
        restored = Restored()
        restore_(restored, latest)
        restored.optimizer.step()
    except TrainingError as error:
        return refused(error, "step_00000002")
    return _loss(f"another kind was loaded: {sorted(each.name for each in latest.iterdir())}")


def _loss(problem):
    raise Loss(problem)


def _change(values, rng, depth=4):
    """Replace a value inside of nested dictionaries and lists by one of another kind."""
    while True:
        key = rng.choice(list(values) if isinstance(values, dict) else range(len(values)))
        inner = values[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            others = [each for each in VALUES if type(each) is not type(inner)]
            values[key] = rng.choice(others)
            return
        values = inner


def _change_manifest(checkpoint, rng):
    path = checkpoint / STATE_FILE
    state = json.loads(path.read_text())
    del state["sha256"]
    _change(state, rng)
    path.write_text(json.dumps(state | {"sha256": _digest(state)}))


def _change_saved(checkpoint, rng):
    """Change a tensor or an option, and sign the files again."""
    name = rng.choice(("optimizer.bin", "random_states_0.pkl"))
    state = torch.load(checkpoint / name, weights_only=False)
    if name == "optimizer.bin":
        entry = state["state"][rng.choice(list(state["state"]))]
        moment, group = rng.choice(list(entry)), state["param_groups"][0]
        key = rng.choice(("betas", "eps", "weight_decay", "amsgrad", "maximize"))
        tensors = (torch.zeros(7), torch.zeros((), dtype=torch.int8), torch.tensor(torch.nan))
        rng.choice(
            (
                lambda: entry.update({moment: rng.choice((*tensors, None, ""))}),
                lambda: entry.pop(moment),
                lambda: group.update({key: rng.choice(VALUES[7:])}),
                lambda: state.pop(rng.choice(("state", "param_groups"))),
                lambda: state["param_groups"].append(rng.choice(VALUES)),
                lambda: group.update(params=rng.choice(([], [0], None))),
            )
        )()
    else:
        state.pop("step")
        key = rng.choice(list(state))
        state[key] = rng.choice(VALUES)
    torch.save(state, checkpoint / name)
    unfinished = Checkpoints(checkpoint.parent).unfinished(2)
    checkpoint.rename(unfinished)
    (unfinished / STATE_FILE).unlink()
    Checkpoints(checkpoint.parent).commit(2, keep=2, num_processes=1)


def start(folder, *, resume, warned=None):
    """What a run does to its folder before its first step, resumed after step ROWS - 2."""
    run, config = RunFolder(folder), tiny_config(folder)
    with run.locked(config, resume=resume):
        run.prepare()
        run.record_start(config, {"started": "now"})
        run.truncate_rows(ROWS - 2, (warned if warned is not None else []).append)
    return run


@kind()
def foreign_folders(folder, rng):
    """Files of others in `output_dir` are all there afterwards, with equal bytes."""
    run = folder / "run"
    for name in rng.sample(NAMES, rng.randrange(1, 6)):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        words = ("", "{}", '{"step": 99}\n', "elip run: ", "name: a\n", "\0" * 9)
        (run / name).write_text(rng.choice(words))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    is_killed_start = before == {run / ".lock": b""}
    try:
        start(run, resume=rng.random() < 0.5)
        outcome = "read"
    except (TrainingError, ConfigError) as error:
        outcome = refused(error, "run")
    for path, content in before.items():
        is_changed = not path.exists() or path.read_bytes() != content
        if is_changed and not (is_killed_start or _is_own(before, run)):
            raise Loss(f"{path.name} was changed")
    return outcome


def _is_own(before, run):
    """A lock that has the signature is that of a start that was killed."""
    own = {run / ".lock", run / "provenance.jsonl", run / ".tokenizer" / "vocab.json"}
    return before.keys() <= own and before.get(run / ".lock", b"").startswith(b"elip run: ")


@kind(share=2)
def run_folders(folder, rng):
    """A file of a run is damaged: refused, or each row that is whole is kept and others counted."""
    run = start(folder / "run", resume=False)
    for step in range(1, ROWS + 1):
        run.append_row({"step": step, "loss": 1 / step})
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    name = rng.choice(
        ("metrics.jsonl", "metrics.jsonl", "recipe.yaml", "provenance.jsonl", ".lock")
    )
    path = run.path / name
    path.write_bytes(damaged(path.read_bytes(), rng))
    kept = [each for each in lines[: ROWS - 2] if each in run.metrics.read_bytes().splitlines(True)]
    is_shorter = b"".join(lines).startswith(run.metrics.read_bytes())
    warned = []
    try:
        run = start(run.path, resume=True, warned=warned)
    except (TrainingError, ConfigError) as error:
        return refused(error, "recipe" if name == "recipe.yaml" else name)
    found = run.metrics.read_bytes().splitlines(keepends=True)
    if lost := set(kept) - set(found):
        raise Loss(f"whole rows were dropped: {lost}")
    if name == "metrics.jsonl" and len(found) < ROWS - 2 and not warned and not is_shorter:
        raise Loss(f"{ROWS - 2 - len(found)} rows are lost without a word")
    return "reported" if warned else "read"
