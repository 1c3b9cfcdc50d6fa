"""Weight files of other libraries: hostile tensors, names, containers, headers and bytes."""

import json
import math
import struct
import warnings
import zipfile

import torch
from safetensors.torch import save_file

from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.checkpoints.names import KINDS
from elip_models.pretraining.checkpoints.renaming import rename_tensors, reversed_names
from elip_models.pretraining.checkpoints.warm_start import warm_start_
from elip_models.pretraining.models.registry import create_model
from tests.fuzz.harness import MARKER, Loss, command, kind, refused
from tests.helpers.damage import damaged

SIZES = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
HEADS = {"vision_heads": 2, "text_heads": 2}
SOURCES = {"clip": "open_clip", "albef": "albef", "blip": "blip"}
SPECIAL = {"clip": {"eos_token_id": 319}, "albef": {}, "blip": {}}
NUMBERS = (0, -1, 1, 2, 7, 2**20, 2**31, 2**63, 10**30, 0.5, 1e400, math.nan)
OTHERS = (None, True, "", "a", "é\0", "../x", [], {}, [[]], {"a": 1}, ["a"], "x" * 10**5)


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


def _hostile_tensors(weight, rng):
    """Functions of which each makes a tensor that a weight file should not have."""
    flat = weight.reshape(-1)
    big = 2 ** rng.randrange(8, 31)
    return {
        "nan": lambda: _with(weight, rng, math.nan),
        "infinite": lambda: _with(weight, rng, rng.choice((math.inf, -math.inf))),
        "kind": lambda: weight.to(rng.choice((torch.bool, torch.int8, torch.int64, torch.uint16))),
        "complex": lambda: weight.to(torch.complex64),
        "float8": lambda: weight.to(torch.float8_e4m3fn),
        "sparse": lambda: weight.to_sparse(),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.qint8),
        "meta": lambda: weight.to("meta"),
        "huge meta": lambda: torch.empty(big, big, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "expanded": lambda: flat[0].expand([big if i == 0 else n for i, n in _dims(weight)]),
        "expanded twice": lambda: flat[:1].expand(rng.randrange(1, 2**15), big),
        "wide": lambda: flat[0].expand([big if n > 1 else n for n in weight.shape]),
        "strided": lambda: weight.as_strided((2, 2), (flat.numel() // 4, flat.numel() // 2)),
        "0-d": lambda: torch.tensor(1.0),
        "1-d": lambda: flat,
        "empty": lambda: weight[:0] if weight.ndim else torch.zeros(0),
        "more dims": lambda: weight.reshape(*(1,) * rng.randrange(1, 20), *weight.shape),
        "fewer rows": lambda: weight[:-1] if weight.ndim else weight,
        "more rows": lambda: torch.cat([weight, weight[-1:]]) if weight.ndim else weight,
        "transposed": lambda: weight.mT.contiguous() if weight.ndim > 1 else weight,
        "half": lambda: weight.half(),
        "requires grad": lambda: torch.nn.Parameter(weight.float()),
    }


def _dims(weight):
    return list(enumerate(weight.shape)) or [(0, 1)]


def _with(weight, rng, value):
    changed = weight.float().clone()
    if changed.numel():
        changed.view(-1)[rng.randrange(changed.numel())] = value
    return changed


def _change_tensors(weights, rng):
    """Replace some tensors by hostile ones."""
    likely = [n for n in weights if "pos" in n or "embed" in n or "temp" in n or "ptr" in n]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name = rng.choice(likely if rng.random() < 0.4 and likely else list(weights))
        kinds = _hostile_tensors(weights[name], rng)
        weights[name] = kinds[rng.choice(list(kinds))]()
        likely = [n for n in likely if n != name]
        if len(likely) < 2 or rng.random() < 0.5:
            break


def _change_names(weights, rng):
    name = rng.choice(list(weights))
    change = rng.randrange(8)
    if change == 0:
        del weights[name]
    elif change == 1:
        weights[rng.choice(("visual.blocks.", "")) + "9" * rng.randrange(1, 6000)] = weights[name]
    elif change == 2:
        layer = rng.choice((7, 1000, 10**9, 10**5000 if rng.random() < 0.2 else 10**20))
        for each in [n for n in weights if ".1." in n]:
            with_number = "9" * 5000 if layer == 10**5000 else str(layer)
            weights[each.replace(".1.", f".{with_number}.")] = weights[each]
    elif change == 3:
        for each in list(weights):
            weights[rng.choice(("module.", "_orig_mod.", "a.")) * rng.randrange(3) + each] = (
                weights.pop(each)
            )
    elif change == 4:
        weights[name.swapcase()] = weights.pop(name)
    elif change == 5:
        weights |= {f"{name}\0{i}": weights[name] for i in range(rng.choice((1, 2000)))}
    elif change == 6:
        weights[name.replace(".weight", ".bias")] = weights[name]
    else:
        weights[rng.choice(("input_resolution", "logit_bias", "queue.image"))] = torch.zeros(())


def _container(weights, rng):
    """Objects that torch.save writes instead of a state dict."""
    values = [*NUMBERS[:8], *OTHERS[:-1], weights, b"a", set(), (), 1j, torch.Size([2])]
    name = rng.choice(list(weights))
    deep = []
    for _ in range(rng.choice((10, 100))):
        deep = [deep]
    choices = (
        lambda: {"model": weights},
        lambda: {"state_dict": weights, "epoch": rng.choice(values)},
        lambda: {"model": rng.choice(values), **weights},
        lambda: {"model": rng.choice(values)},
        lambda: {"state_dict": {"model": weights}},
        lambda: rng.choice(values),
        lambda: list(weights.items()),
        lambda: {**weights, name: rng.choice(values)},
        lambda: {**weights, rng.choice((1, None, b"a", (1, 2), True, 1.5)): weights[name]},
        lambda: {i: weight for i, weight in enumerate(weights.values())},
        lambda: {"model": {**weights, name: RunsCode()}},
        lambda: {"model": weights, "args": RunsCode()},
        lambda: {"model": {**weights, "x" * 10**6: 1}},
        lambda: {"model": {**weights, name: deep}},
    )
    return rng.choice(choices)()


FORGED = (  # instead of the pickle of a zip
    b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.",
    b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R.",
    b"\x80\x02" + b"]" * 10**5 + b".",
    b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
    b"\x80\x02ctorch._utils\n_rebuild_parameter\n(NNNtR.",
    b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00a\x85R.",
    b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
    b"\x80\x02}K\x01b.",
    b"\x80\x02h\x05.",
    b"\x80\x02Q.",
    b"\x80\x02K\x01Q.",
    b".",
    b"",
)


def _write_zip(content, path, rng):
    """Write as torch.save does, or with members changed."""
    torch.save(content, path)
    change = rng.randrange(6)
    if change < 3:
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    pickled = next(each for each in members if each.endswith("data.pkl"))
    if change == 3:
        members[pickled] = rng.choice(FORGED)
    elif change == 4:
        members[pickled] = damaged(members[pickled], rng)
    elif rng.random() < 0.5:
        members[name] = damaged(members[name], rng) if members[name] else b"a"
    else:
        del members[name]
    kind_of = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(path, "w", kind_of) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each, value in members.items():
            archive.writestr(each, value)


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
    if rng.random() < 0.6:
        _change_tensors(weights, rng)
    elif rng.random() < 0.4:
        _change_names(weights, rng)
    suffix = rng.choice((".pth", ".pt", ".bin", ".ckpt", ".safetensors"))
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        strided = {n: w for n, w in weights.items() if w.layout is torch.strided and not w.is_meta}
        plain = {n: w for n, w in strided.items() if not w.is_quantized and w.numel() < 10**6}
        plain = {n: w for n, w in plain.items() if not w.is_nested}
        write_safetensors(plain, path, rng)
    elif rng.random() < 0.15:
        torch.save({"model": weights}, path, _use_new_zipfile_serialization=False)
    elif rng.random() < 0.6:
        torch.save({"model": weights}, path)
    else:
        _write_zip(_container(weights, rng), path, rng)
    if rng.random() < 0.2:
        path.write_bytes(damaged(path.read_bytes(), rng))
        weights = {}
    return path, family, weights


def check_values(model, family, weights):
    """Everything is finite, and the tensors of the file are those of the model."""
    given = rename_tensors(weights, KINDS[SOURCES[family]].names) if weights else {}
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise Loss(f"{name} is not finite")
        if name in given and not torch.equal(given[name].float().reshape(weight.shape), weight):
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
    check_values(model, family, weights if path.suffix != ".safetensors" else {})
    return "read"


@kind(share=0.3, prepare=save_weights)
def convert_commands(folder, rng, prepared):
    path, *_ = _weight_file(folder, rng, prepared)
    output = folder / "out"
    to = rng.choice(("ours", "hf", "open_clip"))
    heads = [f"{name}={value}" for name, value in HEADS.items()]
    outcome = command(["convert", str(path), str(output), *heads, "--to", to])
    if outcome == "refused" and output.exists():
        raise Loss(f"an incomplete folder: {sorted(output.iterdir())}")
    return outcome
