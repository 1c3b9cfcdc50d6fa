"""Saves that are killed at each of their file operations: python -m tests.killed_saves

A save over an earlier one, of the same library or another, is made in a forked process, which ends
at its n-th file operation: before it, or after half of what it writes. What must hold, for each n:
every loader gives what it gives for the complete old folder, or for the complete new one, files of
the user are as before, and the next save leaves nothing of the killed one.
"""

import argparse
import builtins
import copy
import hashlib
import io
import json
import logging
import os
import random
import shutil
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import safetensors.torch
import timm
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

import elip_models
from elip_models.api import strategies_in
from elip_models.integrations.peft.adapt import adapt_
from elip_models.integrations.peft.adapt_config import AdaptConfig
from elip_models.integrations.peft.saved_adapter import save_adapter
from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.training.run_checkpoints import Checkpoints
from elip_models.saving import saved_folder
from elip_models.saving.files import tensors_sha256, write_json, write_tensors
from elip_models.saving.saved_folder import SAVING, publish, unfinished
from tests.helpers.models import hf_clip, hf_vision
from tests.pretraining.models.test_saving import CONFIG, pair
from tests.vlm.models import build

KILLED = 77
FIRST_WRITES = 3
"""Writes of a file that are counted; a JSON file has one for each of its parts."""
SAVED_AGAIN = 3
"""After every so many kills, the save is made again."""
USER_FILES = {"notes.txt": "mine", "sub/a.txt": "mine too", "processor/vocab.json": "{}"}
WRITING = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")
"""Audit events of changes of a folder; `open` for writing is another."""


# Models to save: each function draws its weights by `seed`, and returns what saves it


def reduced(model, seed, config=None):
    strategy = ("tome", "evit")[seed % 2]
    elip_models.reduce_(model, strategy, keep=0.7)
    return partial(elip_models.save_reduced, model, config=config)


def of_timm(seed):
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return reduced(timm.create_model("vit_tiny_patch16_224", depth=3, **sizes), seed)


def of_deeper_timm(seed):
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    return reduced(timm.create_model("vit_tiny_patch16_224", depth=5, **sizes), seed)


def of_open_clip(seed):
    return reduced(pair(), seed, CONFIG)


def hf_vit():
    return hf_vision("ViTForImageClassification", "ViTConfig", num_labels=5)


def of_transformers(seed):
    return reduced(hf_vit(), seed)


def of_clip_model(seed):
    return reduced(hf_clip(), seed)


def of_llava(seed):
    model = build("llava")[0].float()
    nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(seed))
    model.get_input_embeddings().weight.data.add_(seed)
    elip_models.reduce_(model, "diverse", keep=(5, 7)[seed % 2])
    return partial(elip_models.save_reduced, model)


def of_peft(seed):
    base = base_of_adapter()
    elip_models.reduce_(base, ("tome", "evit")[seed % 2], keep=0.7)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(seed)
    return partial(elip_models.save_reduced, get_peft_model(base, config))


def base_of_adapter():
    torch.manual_seed(9)
    return hf_vit()


def of_ours(seed):
    return reduced(elip_models.create_model("clip_tiny"), seed)


def of_ours_with_tokenizer(seed):
    model = elip_models.create_model("elip_clip_tiny", scorer=("exact", "last")[seed % 2])
    words = ["a cat", "a dog", "the sea"] if seed % 2 else ["one two three", "four five"]
    return partial(model.save_pretrained, tokenizer=train_tokenizer(words, 300))


def of_ours_with_adapters(seed):
    model = elip_models.create_model("elip_clip_tiny", scorer=("exact", "last")[seed % 2])
    return adapt_(model, AdaptConfig(kind="lora", r=2 + seed % 2)).save_pretrained


LIBRARIES = {"timm": of_timm, "open_clip": of_open_clip, "transformers": of_transformers}
LIBRARIES |= {"ours": of_ours, "peft": of_peft}
SAVES = LIBRARIES | {
    "nothing": lambda seed: Path.mkdir,
    "timm, deeper": of_deeper_timm,
    "CLIPModel": of_clip_model,
    "LLaVA": of_llava,
    "ours, tokenizer": of_ours_with_tokenizer,
    "ours, adapters": of_ours_with_adapters,
}
PAIRS = [(old, new) for old in ("nothing", *LIBRARIES) for new in LIBRARIES]
PAIRS += [(name, name) for name in SAVES if name not in ("nothing", *LIBRARIES)]
PAIRS += [("timm", "timm, deeper"), ("LLaVA", "timm"), ("ours, tokenizer", "ours, adapters")]
"""The save that is in the folder, and the one over it: all pairs of libraries, and others."""


@cache
def save_of(name, seed):
    torch.manual_seed(seed)
    with quiet():
        return SAVES[name](seed)


@contextmanager
def quiet():
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# What the loaders give


def by_transformers(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder)


def by_load_reduced(folder):
    if (folder / "adapter_config.json").exists() and (folder / "elip.json").exists():
        return elip_models.load_reduced(folder, by_peft(folder))
    return elip_models.load_reduced(folder)


def by_peft(folder):
    return PeftModel.from_pretrained(copy.deepcopy(base_of_adapter()), folder)


LOADERS = {
    "load_reduced": by_load_reduced,
    "timm": lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True),
    "open_clip": lambda folder: open_clip.create_model(f"local-dir:{folder}"),
    "transformers": by_transformers,
    "peft": by_peft,
    "tokenizer": transformers.AutoTokenizer.from_pretrained,
}


def outcome(load, folder):
    """What a loader gives for a folder: a model's class, weights and strategies, or "refused"."""
    torch.manual_seed(0)
    try:
        with quiet():
            model = load(folder)
    except Exception:
        return "refused"
    if isinstance(model, nn.Module):
        weights = tensors_sha256(model.state_dict())
        return type(model).__name__, weights, str(strategies_in(model))
    return type(model).__name__, str(sorted(model.get_vocab().items()))


def outcomes(folder):
    """What each loader gives, in their order."""
    return {name: outcome(load, folder) for name, load in LOADERS.items()}


KNOWN = {}
"""Outcomes by the content of a folder, so that a folder is not loaded twice."""


def known_outcomes(folder):
    key = hashlib.sha256()
    for name, content in sorted(contents(folder).items()):
        key.update(f"{name} {len(content)}\n".encode() + content)
    if key.digest() not in KNOWN:
        KNOWN[key.digest()] = outcomes(folder)
    return KNOWN[key.digest()]


def contents(folder):
    """Relative name -> bytes of each file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# Kills


class Operations:
    """Counts the file operations of this process, and ends it at the one of a number."""

    def __init__(self, root, last):
        self.root, self.last, self.count = str(root), last, 0
        self.is_on = False

    def step(self, half=lambda: None):
        if not self.is_on:
            return
        if self.count == self.last:
            self.is_on = False
            half()
            os._exit(KILLED)
        self.count += 1

    def audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            is_ours = isinstance(path, str | bytes | os.PathLike) and os.fspath(path)
            if is_ours and str(is_ours).startswith(self.root) and flags & WRITING:
                self.step()
        elif event in CHANGES:
            self.step()

    def begin(self):
        sys.addaudithook(self.audit)
        fsync, serialize_file = os.fsync, safetensors.torch.serialize_file
        renameat2, opened = saved_folder._renameat2, io.open

        def counted_fsync(descriptor):
            self.step()
            fsync(descriptor)

        def counted_serialize(tensors, path, *rest, **options):
            def half():
                serialize_file(tensors, path, *rest, **options)
                os.truncate(path, os.path.getsize(path) // 2)

            self.step(half)
            serialize_file(tensors, path, *rest, **options)

        def counted_exchange(*names):
            self.step()
            return renameat2(*names)

        def counted_open(*arguments, **options):
            file = opened(*arguments, **options)
            return CountedFile(file, self) if file.writable() else file

        os.fsync, safetensors.torch.serialize_file = counted_fsync, counted_serialize
        io.open = builtins.open = counted_open
        if renameat2 is not None:
            saved_folder._renameat2 = counted_exchange
        self.is_on = True


class CountedFile:
    """A file whose first writes are operations, of which a killed one writes half."""

    def __init__(self, file, operations):
        self.file, self.operations, self.left = file, operations, FIRST_WRITES

    def write(self, content):
        def half():
            self.file.write(content[: len(content) // 2])
            self.file.flush()

        if self.left:
            self.left -= 1
            self.operations.step(half)
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def is_killed(save, root, number):
    """Whether `save()`, in a forked process, was ended at an operation; it has fewer if not."""
    return run_until(save, root, number) is None


def run_until(save, root, number):
    """The operations of `save()`, in a forked process; None if it was ended at one."""
    report, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with quiet():
                operations = Operations(root, number)
                operations.begin()
                save()
            operations.is_on = False
            os.write(write, str(operations.count).encode())
            os._exit(0)
        except BaseException as error:
            sys.__stderr__.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    os.close(write)
    with open(report) as file:
        count = file.read()
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, KILLED):
        raise AssertionError(f"the save ended with {code} at operation {number}")
    return None if code == KILLED else int(count)


class Pair:
    """A save over another, with the two complete folders that may result."""

    def __init__(self, root, old, new):
        self.root, self.name = Path(root), f"{new} over {old}"
        self.old, self.new = self.root / "old", self.root / "new"
        self.saves = save_of(old, 0), save_of(new, 1)
        with quiet():
            self.saves[0](self.old)
            put_user_files(self.old)
            shutil.copytree(self.old, self.new)
            self.saves[1](self.new)
        self.expected = [known_outcomes(self.old), known_outcomes(self.new)]
        alone = self.root / "alone"
        with quiet():
            self.saves[1](alone)
        kept = LOADERS.keys() - {"tokenizer"}  # one may stay of the earlier save
        over, whole = (
            {name: value for name, value in known_outcomes(folder).items() if name in kept}
            for folder in (self.new, alone)
        )
        assert over == whole, f"{self.name}: {differences(over, whole)}"

    def operations(self):
        """How many operations the save over the other has."""
        place = self.root / "whole"
        shutil.copytree(self.old, place / "model")
        return run_until(partial(self.saves[1], place / "model"), place, None)

    def kill(self, number):
        """Kill the save at an operation -> "old" or "new"; None if it has fewer operations.

        Raises:
            AssertionError: the folder is neither, or a file of the user has changed.
        """
        place = self.root / "killed"
        shutil.rmtree(place, ignore_errors=True)
        folder = place / "model"
        shutil.copytree(self.old, folder)
        is_whole = not is_killed(partial(self.saves[1], folder), place, number)
        where = f"{self.name}, operation {number}"
        if not folder.exists():  # between the two renames of a file system without exchange
            assert set(own_loaders(folder).values()) == {"refused"}, where
            by_load_reduced(folder)
        found = known_outcomes(folder)
        assert found in self.expected, f"{where}: {differences(found, self.expected[0])}"
        for name, text in USER_FILES.items():
            assert (folder / name).read_text() == text, f"{where}: {name}"
        if is_whole:
            assert found == self.expected[1], where
        if number % SAVED_AGAIN == 0:
            self.save_again(place, where)
        return None if is_whole else ("old", "new")[found == self.expected[1]]

    def save_again(self, place, where):
        with quiet():
            self.saves[1](place / "model")
        assert contents(place / "model").keys() == contents(self.new).keys(), where
        found = known_outcomes(place / "model")
        assert found == self.expected[1], f"{where}: {differences(found, self.expected[1])}"
        left = [path for path in place.rglob(f"*{SAVING}*") if any(path.iterdir())]
        assert not left, f"{where}: {left}"


def own_loaders(folder):
    return {name: outcome(load, folder) for name, load in LOADERS.items() if name != "load_reduced"}


def differences(found, other):
    return {name: value for name, value in found.items() if value != other[name]}


def put_user_files(folder):
    for name, text in USER_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@contextmanager
def without_exchange():
    """As on a file system whose folders cannot exchange their names."""
    before, saved_folder._renameat2 = saved_folder._renameat2, None
    try:
        yield
    finally:
        saved_folder._renameat2 = before


# Other writes of the library, each of one file or folder: the bytes are the old or the new ones


def write_checkpoint(folder, seed):
    checkpoints = Checkpoints(folder)
    hidden = unfinished(checkpoints.of(1))
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    write_tensors(hidden / "model.safetensors", {"weight": torch.full((3,), seed)})
    (hidden / "optimizer.bin").write_bytes(bytes([seed]) * 9)
    checkpoints.commit(1, keep=1, num_samples=7)


def write_tokenizer(folder, seed):
    hidden = unfinished(folder / "tokenizer")
    shutil.rmtree(hidden, ignore_errors=True)
    words = (["a cat", "a dog", "the sea"], ["one two three", "four five"])[seed]
    train_tokenizer(words, 300).save_pretrained(hidden)
    publish(folder / "tokenizer")


def write_adapter(folder, seed):
    torch.manual_seed(seed)
    model = elip_models.create_model("elip_clip_tiny")
    save_adapter(adapt_(model, AdaptConfig(kind="lora", r=2 + seed)), folder / "adapter")


def write_state(folder, seed):
    write_tensors(folder / "state.safetensors", {"w": torch.full((3,), seed)}, {"done": seed})


WRITES = {
    "checkpoint of a run": write_checkpoint,
    "tokenizer of a run": write_tokenizer,
    "adapter": write_adapter,
    "state of distill": write_state,
    "best.json": lambda f, seed: write_json(f / "best.json", {"seed": seed}),
}


def visible(folder):
    """The contents of a folder without what a killed write left, which is hidden."""
    found = {name: content for name, content in contents(folder).items() if "/." not in f"/{name}"}
    for name in found:
        if name.endswith(".safetensors"):  # the order of its metadata is random
            with safe_open(folder / name, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                found[name] = file.metadata(), tensors_sha256(tensors)
    return found


def killed_writes(root, name):
    """Kill a write over an earlier one at each of its operations -> how many are old and new."""
    write, found = WRITES[name], Counter()
    for seed, folder in enumerate((root / "old", root / "new")):
        folder.mkdir()
        with quiet():
            write(folder, 0)
            if seed:
                write(folder, seed)
    expected = [visible(root / "old"), visible(root / "new")]
    assert expected[0] != expected[1], name
    for number in range(10**6):
        folder = shutil.copytree(root / "old", root / "killed" / str(number))
        is_whole = not is_killed(partial(write, folder, 1), folder, number)
        assert visible(folder) in expected, f"{name}, operation {number}"
        if is_whole:
            return found
        found[("old", "new")[visible(folder) == expected[1]]] += 1


def kill_all(pair, numbers=None):
    """Kill a save at each of its operations, or at some -> how many folders are old and new."""
    found = Counter()
    for number in numbers or range(10**6):
        which = pair.kill(number)
        if which is None:
            break
        found[which] += 1
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every so many operations")
    parser.add_argument("--seed", type=int, default=0, help="of the first operation, with --every")
    parser.add_argument("--only", nargs="*", help="saves, by their names in the table")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    first = random.Random(options.seed).randrange(options.every)
    numbers, counts = range(first, 10**6, options.every), {}

    def killed_pair(root, old, new):
        return kill_all(Pair(root, old, new), numbers)

    def killed_without_exchange(root):
        with without_exchange():
            return killed_pair(root, "timm", "open_clip")

    saves = {f"{new} over {old}": partial(killed_pair, old=old, new=new) for old, new in PAIRS}
    saves["open_clip over timm, without exchange"] = killed_without_exchange
    saves |= {name: partial(killed_writes, name=name) for name in WRITES}
    for name in options.only or saves:
        with TemporaryDirectory() as root:
            counts[name] = saves[name](Path(root))
            report(name, counts)
    total = sum(counts.values(), Counter())
    sys.stdout.write(f"| all | {total.total()} | {total['old']} | {total['new']} | 0 |\n")
    if options.json:
        rows = {name: {"kills": c.total(), **c, "mixtures": 0} for name, c in counts.items()}
        write_json(options.json, rows | {"all": {"kills": total.total(), **total, "mixtures": 0}})


def report(name, counts):
    if len(counts) == 1:
        sys.stdout.write(f"| save | kills | old | new | mixtures |\n{'| --- ' * 5}|\n")
    found = counts[name]
    sys.stdout.write(f"| {name} | {found.total()} | {found['old']} | {found['new']} | 0 |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
