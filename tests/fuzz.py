"""Damaged inputs of every kind, by a seed: python -m tests.fuzz --count 2000

A case is a kind and a number: images, tars, JSON lists, captions, model folders, checkpoints,
command lines. It is made, damaged and read in a folder of its own. What must hold of each: no
exception but those that users are told of, ten seconds, two gigabytes, nothing written outside, and
no sample lost without a word: of those put in, each is read or there is a report.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from elip_models.data import JsonSource, ShardSource, check_source
from elip_models.models.registry import create_model
from elip_models.training.errors import TrainingError
from elip_models.training.run_checkpoints import Checkpoints
from tests.helpers.damage import picture, shard

SECONDS = 10
GIGABYTES = 2
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
COUNT = 5  # samples of a case


class Failure(Exception):
    """What must hold does not."""


def damage(content, rng):
    """Bytes with one of six kinds of damage."""
    at, length = rng.randrange(len(content)), rng.choice((1, 4, 512))
    junk = rng.randbytes(length)
    return rng.choice(
        (
            content[:at],
            content[:at] + junk + content[at + length :],
            content[:at] + bytes(length) + content[at + length :],
            content[:at] + content[at + length :],
            content[:at] + junk + content[at:],
            content[:at] + content[at : at + length] + content[at:],
        )
    )


def check_counts(source, put_in):
    """Each sample that was put in is read, or something is reported."""
    report = check_source(source)
    read = report.seen - len(report.reasons)
    if read < put_in and not report.reasons:
        raise Failure(f"{put_in - read} samples are lost without a word")
    return "reported" if report.reasons else "read"


def images(folder, rng):
    for i in range(COUNT):
        content = picture(i, rng.choice(FORMATS))
        (folder / f"{i}.png").write_bytes(damage(content, rng) if i else content)
    entries = [{"image": f"{i}.png", "caption": f"number {i}"} for i in range(COUNT)]
    (folder / "list.json").write_text(json.dumps(entries))
    return check_counts(JsonSource(folder / "list.json"), COUNT)


def tars(folder, rng):
    path = shard(folder / "s.tar")
    content = path.read_bytes()
    path.write_bytes(damage(content, rng))
    try:
        source = ShardSource(path)
    except ValueError as error:
        return refused(error, "s.tar")
    return check_counts(source, 6)


def lists(folder, rng):
    (folder / "a.png").write_bytes(picture())
    entries = [{"image": "a.png", "caption": [f"number {i}", "näher"]} for i in range(COUNT)]
    content = json.dumps(entries, ensure_ascii=False).encode()
    (folder / "list.json").write_bytes(damage(content, rng))
    try:
        source = JsonSource(folder / "list.json")
    except ValueError as error:
        return refused(error, "list.json")
    return check_counts(source, len(source))


def captions(folder, rng):
    def text():
        codes = (rng.choice((rng.randrange(0x110000), rng.randrange(32, 127))) for _ in range(20))
        return "".join(map(chr, codes))

    (folder / "a.png").write_bytes(picture())
    entries = [{"image": "a.png", "caption": text()} for _ in range(COUNT)]
    (folder / "list.json").write_text(json.dumps(entries))
    return check_counts(JsonSource(folder / "list.json"), COUNT)


def models(folder, rng):
    model = shutil.copytree(saved_model(), folder / "model")
    path = rng.choice(sorted(model.iterdir()))
    path.write_bytes(damage(path.read_bytes(), rng))
    return command(["eval", "retrieval", "--model", str(model), "--data", "emoji_scenes:size=3"])


def checkpoints(folder, rng):
    found = Checkpoints(folder / "checkpoints")
    for step in (1, 2):
        unfinished = found.unfinished(step)
        unfinished.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.bin", "random_states_0.pkl"):
            (unfinished / name).write_bytes(rng.randbytes(300))
        found.commit(step, keep=2)
    path = rng.choice(sorted((found.path / "step_00000002").iterdir()))
    content = path.read_bytes()
    path.write_bytes(damage(content, rng))
    if rng.random() < 0.2:
        path.unlink()
    told = []
    try:
        newest = found.latest(told.append)
    except TrainingError as error:
        return refused(error, "step_")
    changed = not path.exists() or _value(path.read_bytes()) != _value(content)
    if changed != (newest.name == "step_00000001") or changed != bool(told):
        raise Failure(f"{path.name} was {'damaged' * changed or 'whole'}, {newest.name} is used")
    return "reported" if told else "read"


def _value(content):
    """What JSON says, for white space in it says nothing; bytes that are none as they are."""
    try:
        return json.loads(content)
    except ValueError:
        return content


WORDS = (
    *("train", "clip_tiny", "eval", "retrieval", "data", "check", "profile", "--model", "study"),
    *("--flops-only", "visualize", "convert", "finetune", "--from", "--dry-run", "vqa", "export"),
    *("optim.lr=-1", "seed=1e9", "data.train=x.tar", "a=b=c", "model.overrides={", "~nouser/x"),
    *(
        "emoji_scenes:size=0",
        "emoji_scenes:seed=-1",
        "\0",
        "x" * 300,
        "",
        "--",
        "-1",
        "😀",
        "../..",
    ),
)


def commands(folder, rng):
    first, *others = [rng.choice(WORDS[:18]), *rng.choices(WORDS, k=rng.randrange(5))]
    ends = {"train": ["optim.lr=-1"], "study": ["--dry-run"], "profile": ["--flops-only"]}
    return command([first, *others, *ends.get(first, ())])  # none that runs for long


def command(arguments):
    from elip_models.cli import main

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(arguments)
    except SystemExit as exit:
        if exit.code not in (0, 2):
            raise Failure(f"exit status {exit.code}: {output.getvalue()[-200:]}") from exit
        return "reported" if exit.code else "read"


def refused(error, name):
    if name not in str(error):
        raise Failure(f"{name} is not named: {error}")
    return "refused"


KINDS = {
    each.__name__: each for each in (images, tars, lists, captions, models, checkpoints, commands)
}
SLOW = ("models", "commands")  # a tenth as many of these


def saved_model():
    """A tiny model and its tokenizer, made once."""
    folder = Path(os.environ["FUZZ_FOLDER"]) / "saved"
    if not folder.exists():
        from elip_models.data import train_tokenizer

        tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
        sizes = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = create_model("clip_tiny", vocab_size=len(tokenizer), **sizes, **ends)
        model.save_pretrained(folder, tokenizer=tokenizer)
    return folder


def run(kind, number, root):
    """What became of a case; a text that begins with FAILED where something does not hold."""
    folder = root / f"{kind}-{number}"
    folder.mkdir()
    os.chdir(folder)
    before, start = sorted(os.listdir(root)), time.monotonic()
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = KINDS[kind](folder, random.Random(f"{kind} {number}"))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"FAILED {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
    finally:
        signal.alarm(0)
        os.chdir(root)
    peak = peak_gigabytes()
    if peak > GIGABYTES:
        outcome = f"FAILED {peak:.1f} GiB"
    if sorted(os.listdir(root)) != before:
        outcome = f"FAILED written outside: {set(os.listdir(root)) - set(before)}"
    shutil.rmtree(folder)
    return outcome, time.monotonic() - start


def peak_gigabytes():
    """The most memory of this process so far, of all cases (GiB).

    The kernel's own count since this program began: `getrusage` would also count what the process
    that started it had held.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def _late(*_):
    raise Failure(f"more than {SECONDS} seconds")


def table(count, only=()):
    """kind -> how often each outcome; and the failures."""
    outcomes, failures = {}, []
    with TemporaryDirectory() as root:
        os.environ["FUZZ_FOLDER"] = root
        saved_model()
        for kind in only or KINDS:
            cases = max(1, count // (10 * len(KINDS)) if kind in SLOW else count // 5)
            outcomes[kind] = Counter()
            for number in range(cases):
                outcome, seconds = run(kind, number, Path(root))
                if outcome.startswith("FAILED"):
                    failures.append(f"{kind} {number}: {outcome} after {seconds:.1f} s")
                outcomes[kind][outcome.split()[0]] += 1
    return outcomes, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--only", nargs="*", default=(), choices=KINDS)
    options = parser.parse_args()
    outcomes, failures = table(options.count, options.only)
    for kind, counted in outcomes.items():
        said = ", ".join(f"{name} {number}" for name, number in sorted(counted.items()))
        sys.stdout.write(f"{kind:12} {counted.total():5}: {said}\n")
    sys.stdout.write("\n".join([*failures, f"{len(failures)} failures", ""]))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
