"""A model folder runs no code, takes no more memory than its weights, and misses none of them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import elip_models
from elip_models.saving.open_model import open_model
from tests.pretraining.models.test_saving import CONFIG
from tests.saving.test_open_model import tiny_vit
from tests.saving.test_saved_reduced import LIBRARIES

CODE = """
import os, pathlib
pathlib.Path(os.environ["CODE_RAN"]).touch()
from transformers import {base}
class Evil({base}):
    model_type = "{model_type}"
"""
AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", None],
}


def foreign(folder, model_type, **more):
    """Write a config of transformers that names Python code beside it."""
    config = {"model_type": model_type, "auto_map": AUTO_MAP, **more}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "evil.py").write_text(CODE.format(base="PretrainedConfig", model_type=model_type))


def as_reduced(folder):
    settings = {"version": 1, "strategy": "tome", "settings": {"r": 1}}
    (folder / "elip.json").write_text(json.dumps(settings))
    foreign(folder, "align_text_model")


def named_class(folder):
    as_reduced(folder)
    foreign(folder, "evil", architectures=["pipeline"])


def hub_tower(folder):
    text = CONFIG["text_cfg"] | {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    described = {"model_cfg": CONFIG | {"text_cfg": text}, "preprocess_cfg": {}}
    as_reduced(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(described))


WAYS = {
    "open_model": (lambda f: foreign(f, "align_text_model"), "open_model('hf:{}')"),
    "open_model of an unknown type": (lambda f: foreign(f, "evil"), "open_model('hf:{}')"),
    "open_model, random": (
        lambda f: foreign(f, "align_text_model"),
        "open_model('hf:{}', pretrained=False)",
    ),
    "load_reduced": (as_reduced, "load_reduced('{}')"),
    "load_reduced of any attribute": (named_class, "load_reduced('{}')"),
    "open_clip's text tower": (hub_tower, "load_reduced('{}')"),
}
CALL = """
import sys
import elip_models
for call in sys.argv[1:]:
    try:
        eval(f"elip_models.{call}")
    except ValueError as error:
        print("refused", error)
"""


@pytest.mark.slow
def test_code_of_a_folder_does_not_run_whatever_is_answered(tmp_path):
    marker, calls, folders = tmp_path / "marker", [], []
    for fill, call in WAYS.values():
        folder = tmp_path / f"model_{len(calls)}"
        folder.mkdir()
        fill(folder)
        folders.append(folder)
        calls.append(call.format(folder))
    done = subprocess.run(
        [sys.executable, "-c", CALL, *calls],
        input="y\n" * 99,
        env=os.environ | {"CODE_RAN": str(marker), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert not marker.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert not done.returncode, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused")]
    assert [str(folder) in line for folder, line in zip(folders, refused, strict=True)] == [
        True
    ] * len(WAYS)


def reduced_folder(library, folder):
    """A reduced model of a library, the path of its weights, and a tensor in them."""
    make, config, _ = LIBRARIES[library]
    model = elip_models.reduce_(make(), strategy="tome")
    elip_models.save_reduced(model, folder, config=config)
    path = next(folder.glob("*.safetensors"))
    return path, next(
        name for name in load_file(path) if name.endswith("fc1.weight") or "c_fc.weight" in name
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return `reduced_folder` that saves each library's model once."""
    return cache(lambda library: reduced_folder(library, tmp_path_factory.mktemp(library)))


def change(path, name, value):
    """Replace a tensor of a file by what `value` returns for it; None removes it."""
    weights = load_file(path)
    new = value(weights.pop(name))
    save_file(weights | ({} if new is None else {name: new}), path, metadata={"format": "pt"})


DAMAGES = {
    "missing": lambda weight: None,
    "NaN": lambda weight: weight.index_fill(0, torch.tensor([1]), torch.nan),
    "infinite": lambda weight: weight.index_fill(0, torch.tensor([1]), torch.inf),
    "int8": lambda weight: weight.to(torch.int8),
    "bool": lambda weight: weight.bool(),
    "of another shape": lambda weight: weight[1:].clone(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("library", ["timm", "open_clip", "transformers"])
def test_weights_that_a_reduced_model_cannot_have_are_named(saved, library, damage, tmp_path):
    path, name = saved(library)
    path = shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True) / path.name
    change(path, name, DAMAGES[damage])
    with pytest.raises(ValueError) as caught:
        elip_models.load_reduced(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)


class RunsCode:
    """A class whose pickle runs code."""

    def __reduce__(self):
        return exec, ("raise AssertionError('code ran')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_is_refused_without_advice_to_run_it(write, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    write(RunsCode(), file)
    for spec in (f"hf:{tmp_path}", f"timm:test_vit:{file}", f"open_clip:ViT-B-32:{file}"):
        with torch.device("meta"), pytest.raises(ValueError) as caught:
            open_model(spec)
        assert str(tmp_path) in str(caught.value)
        assert "weights_only=False" not in str(caught.value)


def test_a_part_that_a_file_lacks_is_new_and_named(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no weights for pooler of ViTModel, which have initial"):
        model = open_model(f"hf:{tmp_path}")
    assert model.pooler is not None


SIZES = {
    "timm": ("config.json", ("model_args", "depth"), ("model_args", "embed_dim")),
    "open_clip": (
        "open_clip_config.json",
        ("model_cfg", "vision_cfg", "layers"),
        ("model_cfg", "text_cfg", "width"),
    ),
    "transformers": (
        "config.json",
        ("text_config", "num_hidden_layers"),
        ("vision_config", "hidden_size"),
    ),
}
SET = """
import resource, sys
import elip_models, timm, open_clip, transformers
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for folder in sys.argv[1:]:
    try:
        elip_models.load_reduced(folder)
    except ValueError as error:
        print(f"refused {error}")
"""


def oversized(library, folder):
    """Copies of a saved folder, each with a size that its weights do not have."""
    file, *keys = SIZES[library]
    for key in keys:
        for value in (10**6, 2**20, 10**12):
            copied = shutil.copytree(folder, folder.with_name(f"{library}_{key[-1]}_{value}"))
            config = json.loads((copied / file).read_text())
            part = config
            for name in key[:-1]:
                part = part.setdefault(name, {}) or part
            part[key[-1]] = value
            (copied / file).write_text(json.dumps(config))
            yield str(copied)


@pytest.mark.slow
def test_sizes_are_held_to_the_file_before_memory_is_taken(saved, tmp_path):
    folders = []
    for library in SIZES:
        path, _ = saved(library)
        folders += oversized(library, shutil.copytree(path.parent, tmp_path / library))
    done = subprocess.run(
        [sys.executable, "-c", SET, *folders], capture_output=True, text=True, timeout=100
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(folders), done.stderr
    for line, folder in zip(lines, folders, strict=True):
        assert line.startswith(f"refused {folder}/")
