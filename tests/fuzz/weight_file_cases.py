"""Weight files and folders of other libraries: hostile tensors, headers, bytes and configs."""

import json
import math
import shutil
import struct

import torch
from safetensors.torch import save_file

from elip_models.pretraining.checkpoints.export import save_as
from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.checkpoints.warm_start import warm_start_
from elip_models.pretraining.data import train_tokenizer
from elip_models.pretraining.models.registry import create_model
from tests.fuzz.harness import MARKER, Loss, kind, refused
from tests.fuzz.hostile_json import change_json
from tests.helpers.damage import damaged

SIZES = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
HEADS = {"vision_heads": 2, "text_heads": 2}
SOURCES = {"clip": "open_clip", "albef": "albef", "blip": "blip"}
SPECIAL = {"clip": {"eos_token_id": 319}, "albef": {}, "blip": {}}
NUMBERS = (0, -1, 1, 2, 7, 2**20, 2**31, 2**63, 10**30, 0.5, 1e400, math.nan)
OTHERS = (None, True, "", "a", "é\0", "../x", [], {}, [[]], {"a": 1}, ["a"], "x" * 10**5)
TENSORS = {
    "nan": lambda weight: torch.full_like(weight, math.nan, dtype=torch.float32),
    "infinite": lambda weight: torch.full_like(weight, -math.inf, dtype=torch.float32),
    "bool": lambda weight: weight.bool(),
    "complex": lambda weight: weight.to(torch.complex64),
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "fewer rows": lambda weight: weight[:-1],
    "more rows": lambda weight: torch.cat([weight, weight[-1:]]),
    "transposed": lambda weight: weight.mT.contiguous(),
    "more dims": lambda weight: weight[None, None],
    "half": lambda weight: weight.half(),
}


class RunsCode:
    """A class whose pickle writes the marker file."""

    def __reduce__(self):
        return exec, (f"import os; open(os.environ['{MARKER}'], 'w').close()",)


def save_weights(folder):
    """Weights of tiny models under the names of the official files."""
    for family, source in SOURCES.items():
        model = create_model(f"{family}_tiny", vocab_size=320, **SIZES, **SPECIAL[family])
        weights = rename_tensors(model.state_dict(), reversed_names(KINDS[source].names))
        torch.save(weights, folder / f"{family}.pth")


def _change(weights, rng):
    """Replace, remove or rename a tensor, or all names."""
    matrices = [name for name, weight in weights.items() if weight.ndim > 1]
    name, change = rng.choice(matrices), rng.randrange(5)
    if change < 2:
        weights[name] = TENSORS[rng.choice(list(TENSORS))](weights[name])
    elif change == 2:
        del weights[name]
    elif change == 3:
        weights[name.swapcase()] = weights.pop(name)
    else:
        prefix = rng.choice(("module.", "_orig_mod.", "a."))
        for other in list(weights):
            weights[prefix + other] = weights.pop(other)


def _container(weights, rng):
    """Return an object that torch.save writes instead of a state dict."""
    name = rng.choice(list(weights))
    choices = (
        {"state_dict": weights, "epoch": rng.choice(NUMBERS)},
        {"model": rng.choice(OTHERS)},
        rng.choice(OTHERS),
        list(weights.items()),
        {**weights, name: rng.choice(OTHERS)},
        {**weights, rng.choice((1, None, (1, 2), 1.5)): weights[name]},
        {"model": {**weights, name: RunsCode()}},
        {"model": weights, "args": RunsCode()},
    )
    return rng.choice(choices)


def write_safetensors(weights, path, rng):
    """Write a safetensors file, mostly with a changed header."""
    save_file({n: w.detach().clone().contiguous() for n, w in weights.items()}, path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = _header(header, rng)
    size = rng.choice((len(text),) * 9 + (0, 2**63, len(text) + 10**8, len(text) - 1))
    path.write_bytes(struct.pack("<Q", size % 2**64) + text + content[8 + length :])


def _header(header, rng):
    name = rng.choice(list(header))
    entry = header[name]
    change = rng.randrange(10)
    if change == 0:
        kinds = ("BOOL", "I8", "F64", "F8_E4M3", "F4", "C64", "X", "", 3, None)
        entry["dtype"] = rng.choice(kinds)
    elif change == 1:
        entry["shape"] = rng.choice(([2**31] * 2, [], [-1], [0], [2**64], "a", [1.5], None))
    elif change == 2:
        offsets = ([0, 0], [0, 2**62], [4, 0], [-1, 3], [0], "a", None, [0, 4, 8])
        entry["data_offsets"] = rng.choice(offsets)
    elif change == 3:
        del entry[rng.choice(list(entry))]
    elif change == 4:
        header["__metadata__"] = rng.choice((*OTHERS, {"a": {"b": 1}}, {"format": "tf"}, 3))
    elif change == 5:
        header[name] = rng.choice((*OTHERS, *NUMBERS[:5]))
    text = json.dumps(header).encode()
    if change == 6:
        text = text[:-1] + b"," + json.dumps({name: entry}).encode()[1:]  # a name twice
    elif change == 7:
        text = b"[" * 10**5
    elif change == 8:
        text = damaged(text, rng)
    return text


def _weight_file(folder, rng, prepared):
    """Write a hostile weight file; returns its path, the family and what its tensors are."""
    family = rng.choice(list(SOURCES))
    weights = torch.load(prepared / f"{family}.pth")
    path = folder / f"weights{rng.choice(('.pth', '.ckpt', '.safetensors'))}"
    if path.suffix == ".safetensors":
        write_safetensors(weights, path, rng)
        return path, family, {}
    if rng.random() < 0.3:
        torch.save(_container(weights, rng), path)
    else:
        _change(weights, rng)
        torch.save({"model": weights}, path)
    if rng.random() < 0.2:
        path.write_bytes(damaged(path.read_bytes(), rng))
        weights = {}
    return path, family, weights


def check_values(model, family, weights):
    """Everything is finite, and the tensors of the file are those of the model."""
    ours = rename_tensors(weights, KINDS[SOURCES[family]].names) if weights else {}
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise Loss(f"{name} is not finite")
        if name in ours and not torch.equal(ours[name].float().reshape(weight.shape), weight):
            raise Loss(f"{name} has other values than the file")


@kind(share=2, prepare=save_weights)
def weight_files(folder, rng, prepared):
    path, family, weights = _weight_file(folder, rng, prepared)
    try:
        if rng.random() < 0.3:
            model = create_model(f"{family}_tiny", vocab_size=320, **SIZES)
            warm_start_(model, path)
            weights = {}  # momentum copies and the queue are not read
        else:
            model = convert_checkpoint(path, **HEADS)
    except (ValueError, FileNotFoundError) as error:
        return refused(error, ":")
    check_values(model, family, weights)
    return "read"


def save_folders(folder):
    """A tiny CLIP as a folder of transformers and of open_clip."""
    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    model = create_model("clip_tiny", vocab_size=320, **SIZES, **SPECIAL["clip"])
    save_as(model, folder / "hf_clip", "hf", tokenizer=tokenizer)
    save_as(model, folder / "open_clip", "open_clip")


@kind(share=1, prepare=save_folders)
def library_folders(folder, rng, prepared):
    source = shutil.copytree(prepared / rng.choice(("hf_clip", "open_clip")), folder / "model")
    path = rng.choice(sorted(source.glob("*config*.json")))
    if rng.random() < 0.75:
        change_json(path, rng)
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))
    try:
        model = convert_checkpoint(source, **(HEADS if rng.random() < 0.3 else {}))
    except (ValueError, FileNotFoundError) as error:
        return refused(error, ":")
    check_values(model, "clip", {})
    return "read"
