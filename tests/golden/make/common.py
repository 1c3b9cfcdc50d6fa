"""Shared parts of the scripts: drawn weights, recorded selections, margins, files."""

import hashlib
import importlib
import json
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[1]
COMMITS = {
    "CDPruner": "Theia-4869/CDPruner @ 9541616c40fcd5625de1cdb8ea6c33c129eb7864",
    "ELIP": "guoyang9/ELIP @ 2d6b65b6f0c3a3cc2afd11706eae68dcf1a231b6",
    "EViT": "youweiliang/evit @ 5ca95a7cf4a8637193284895c5bc0dd9dc365982",
    "VisionZip": "dvlab-research/VisionZip @ 3151f6df4fca36a4cd1c985e5956e725b1f9ad02",
    "VQA": "GT-Vision-Lab/VQA @ a013f0043c1e2cdc995922dfe257f7149aa9af06",
    "ToMe": "facebookresearch/ToMe @ af95e4b1befa172dadccd8c81e223b10090f9579",
}
LEAST_MARGIN = 0.005  # relative gap of the scores at every boundary between kept and pruned


def stub(name, **attributes):
    """Add a stand-in for a module that an official file imports."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(attributes)
    return module


def package(name, folder):
    """Make the modules of a folder importable without running its `__init__.py`."""
    stub(name, __path__=[str(folder)])


def ignore_documentation_decorator():
    """Replace a decorator of transformers that only edits docstrings; its arguments changed."""
    file_utils = importlib.import_module("transformers.file_utils")
    file_utils.add_code_sample_docstrings = lambda **options: lambda function: function


def exact_in_half(values):
    """Round to values that float16 stores exactly."""
    return values.half().to(values.dtype)


def randn(*shape, seed):
    """Return normal values that float16 stores exactly."""
    return exact_in_half(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def draw_weights_(model, seed):
    """Draw every parameter: matrices by fan-in, embeddings with std 0.5, norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = any(part in name.lower() for part in ("norm", "ln_"))
        if ("embed" in name and "proj" not in name) or "cls_token" in name:
            values = 0.5 * values
        elif name == "proj":  # open_clip's: large, so that the text matters
            values = 0.4 * values
        elif parameter.ndim >= 2:
            values = values * parameter[0].numel() ** -0.5
        else:
            values = 0.1 * values + int(is_norm and name.endswith("weight"))
        parameter.data.copy_(exact_in_half(values))


def use_plain_layer_norm_(model):
    """Replace the LayerNorm of METER, which always computes in float32, for a float64 run."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = torch.nn.LayerNorm


@contextmanager
def recorded_sorts():
    """Yield the list of (scores, sorted scores, order) of every descending sort.

    The official code then normalises the pruned part of the sorted scores in place. After the run
    that part contains the merge weights.
    """
    calls, sort = [], torch.Tensor.sort

    def recording(scores, *args, **kwargs):
        result = sort(scores, *args, **kwargs)
        if kwargs.get("descending"):
            calls.append((scores.detach().clone(), *result))
        return result

    with mock.patch.object(torch.Tensor, "sort", recording):
        yield calls


def stage_tensors(sorts, keeps):
    """Return the tensors of each stage, and the least relative gap at its keep boundary."""
    tensors, margins = {}, []
    for s, ((scores, values, order), keep) in enumerate(zip(sorts, keeps, strict=True)):
        kept = order[:, :keep].sort(dim=1)[0] + 1
        tensors |= {
            f"stage{s}/cls_attn": scores,
            f"stage{s}/keep_idx": torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1),
            f"stage{s}/merge_idx": order[:, keep:] + 1,
            f"stage{s}/merge_w": values[:, keep:],
        }
        ranked = scores.sort(dim=1, descending=True)[0]
        margins.append((1 - ranked[:, keep] / ranked[:, keep - 1]).min().item())
    return tensors, margins


def weighted_sum(outputs, seed):
    """Return the loss and its weights: the sum of each output times fixed random values."""
    upstream = {
        f"upstream/{name}": exact_in_half(0.1 * randn(*out.shape, seed=seed + k))
        for k, (name, out) in enumerate(outputs.items())
    }
    return sum(
        (out * upstream[f"upstream/{n}"].to(out)).sum() for n, out in outputs.items()
    ), upstream


def gradients(model, **inputs):
    """Return the gradients of all parameters that have one, and of the inputs."""
    leaves = dict(model.named_parameters()) | inputs
    return {f"grad/{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def weights(model):
    """Return parameters and buffers by name, tied ones once."""
    seen = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen.setdefault(f"sd/{name}", tensor.detach().clone())
    return seen


def gradient_error(tensors, double):
    """Return the largest difference of gradients from a float64 run, relative to the tests' bound.

    The bound is 1e-5 of the largest entry of a gradient, and at least 1e-8 of the largest of all.
    """
    names = [n for n in tensors if n.startswith("grad/") and not n.endswith("self.key.bias")]
    largest = max(tensors[name].abs().max() for name in names)
    return max(
        (
            (tensors[n] - double[n]).abs().max()
            / (1e-5 * max(tensors[n].abs().max(), 1e-3 * largest))
        )
        for n in names
    ).item()


def first_accurate_seed(record, *args):
    """Return the first seed with the least margins whose gradients are accurate in float32.

    Args:
        record: function of `args`, a seed and a dtype that returns the tensors and the margins.
        args: first arguments of `record`.
    """
    error = {}

    def run(seed):
        tensors, margins = record(*args, seed)
        if min(margins) >= LEAST_MARGIN:
            double, _ = record(*args, seed, torch.float64)
            error[seed] = gradient_error(tensors, double)
            if error[seed] > 0.5:
                margins = [0.0]
        return tensors, margins

    seed, tensors, margins = first_seed(run)
    return tensors, {"seed": seed, "margins": margins, "gradient_error": error[seed]}


def first_seed(run, least=LEAST_MARGIN):
    """Return the first seed whose run has no margin below `least`, and the results of the run.

    Args:
        run: function of a seed that returns the tensors and a list of margins.
        least: smallest margin that is accepted.
    """
    for seed in count():
        tensors, margins = run(seed)
        if min(margins) >= least:
            return seed, tensors, margins


def save(name, tensors, *, source, root, files, **meta):
    """Write the tensors and the description of a case to `tests/golden`.

    Args:
        name: name of the case, and of its two files.
        tensors: tensors by key. Values that float16 stores exactly are stored as float16, indices
            as int32.
        source: key of `COMMITS`.
        root: official checkout.
        files: official files that ran, relative to `root`.
        meta: further fields of the description.
    """
    stored = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous().clone()
        if tensor.dtype == torch.int64 and not key.startswith("sd/"):
            tensor = tensor.int()
        elif tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
            tensor = tensor.half()
        stored[key] = tensor
    path = FOLDER / f"{name}.safetensors"
    save_file(stored, path)
    path.chmod(0o644)
    digests = {f: hashlib.sha256((Path(root) / f).read_bytes()).hexdigest() for f in files}
    meta = {"source": COMMITS[source], "sha256": digests, "torch": torch.__version__} | meta
    lines = ",\n".join(f' "{key}": {json.dumps(value)}' for key, value in meta.items())
    (FOLDER / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
