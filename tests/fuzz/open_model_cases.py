"""Hostile model folders: of this library, of timm, open_clip and transformers, and hub names."""

import json
import shutil
import warnings

import torch
from safetensors.torch import load_file, save_file

from elip_models import load_reduced, open_model, reduce_, save_reduced
from elip_models.pretraining.models.registry import create_model, load_model
from tests.fuzz.harness import Loss, kind, refused
from tests.fuzz.hostile_json import change_json, value
from tests.helpers.damage import damaged

DOCUMENTED = (ValueError, FileNotFoundError, TypeError)
CODE = """
import os, pathlib
pathlib.Path(os.environ["CODE_RAN"]).touch()
from transformers import PretrainedConfig, PreTrainedModel
class Evil(PretrainedConfig):
    model_type = "evil"
"""
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
VIT |= {"intermediate_size": 16, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def change_weights(path, rng):
    """Damage one tensor of a safetensors file; returns its name, and whether it must be refused."""
    weights = load_file(path)
    name = rng.choice(sorted(key for key in weights if weights[key].is_floating_point()))
    tensor = weights[name]
    damages = (
        lambda: None,
        lambda: tensor * torch.nan,
        lambda: tensor + torch.inf,
        lambda: tensor.to(rng.choice((torch.int8, torch.int64, torch.bool, torch.complex64))),
        lambda: tensor[None].clone(),
        lambda: tensor.flatten()[:-1].clone(),
        lambda: tensor.new_empty(0),
    )
    new = rng.choice(damages)()
    del weights[name]
    save_file(weights | ({} if new is None else {name: new}), path, metadata={"format": "pt"})
    return name


def hostile(folder, rng, extra=()):
    """Change a folder in one of three ways; returns a tensor that must be named, or None."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    configs = [path for path in paths if path.suffix == ".json"]
    weights = [path for path in paths if path.suffix == ".safetensors"]
    chosen = rng.random()
    if chosen < 0.3:
        return change_weights(rng.choice(weights), rng)
    if chosen < 0.4:
        path = rng.choice(paths)
        path.write_bytes(damaged(path.read_bytes(), rng) if rng.random() < 0.8 else b"")
    elif chosen < 0.45:
        rng.choice(paths).unlink()
    else:
        change_json(rng.choice(configs), rng, extra)
    return None


def tried(load, name):
    """What was loaded, or None, and the outcome; an error must name a damaged tensor."""
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = load()
    except DOCUMENTED as error:
        return None, refused(error, *([name] if name else []))
    tower = name and name.partition(".")[0]
    if name is not None and not any(tower in str(warning.message) for warning in told):
        raise Loss(f"{name} was damaged, and nothing said so")
    return loaded, "reported" if told else "read"


def opened(load, name=None):
    """Load a model, whose weights must be finite where it was not refused."""
    model, outcome = tried(load, name)
    for key, tensor in () if model is None else model.named_parameters():
        if not tensor.isfinite().all():
            raise Loss(f"not finite: {key}")
    return outcome


def save_ours(folder):
    from elip_models.integrations.peft.adapt import adapt_
    from elip_models.integrations.peft.adapt_config import AdaptConfig
    from elip_models.pretraining.data import train_tokenizer

    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    sizes = {"vision_width": 16, "vision_heads": 2, "text_width": 16, "text_heads": 2}
    sizes |= {"vision_depth": 2, "text_depth": 2, "schedule": "1(100%) 1(50%)"}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("plain", "lora", "adapter"):
        model = create_model("clip_tiny", vocab_size=len(tokenizer), **sizes, **ends)
        if name != "plain":
            adapt_(model, AdaptConfig(kind=name, r=2, width=4))
        model.save_pretrained(folder / name, tokenizer=tokenizer)


@kind(prepare=save_ours)
def model_folders(folder, rng, prepared):
    copy = shutil.copytree(prepared / rng.choice(("plain", "lora", "adapter")), folder / "model")
    tensor = hostile(copy, rng, ("schedule", "strategy", "target_modules", "r", "width", "full"))
    if rng.random() < 0.2:
        model = load_model(prepared / "plain")
        return tried(lambda: model.load_tokenizer(str(copy)), None)[1]
    return opened(lambda: rng.choice((load_model, load_reduced, open_model))(str(copy)), tensor)


def save_others(folder):
    import open_clip
    import timm
    import transformers

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24)
    save_reduced(reduce_(vit, strategy="tome"), folder / "timm")
    clip = reduce_(open_clip.CLIP(**OPEN_CLIP), strategy="tome")
    save_reduced(clip, folder / "open_clip", config=OPEN_CLIP)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    save_reduced(reduce_(model, strategy="tome"), folder / "transformers")


EXTRA = (
    *("architectures", "auto_map", "hf_model_name", "timm_model_name", "quantization_config"),
    *("attn_implementation", "dtype", "torch_dtype", "model_args", "features_only", "depth"),
    *("layers", "checkpoint_path", "pretrained", "transformers_weights", "label2id", "num_labels"),
    "module",
)


@kind(prepare=save_others)
def load_reduced_folders(folder, rng, prepared):
    library = rng.choice(("timm", "open_clip", "transformers"))
    copy = shutil.copytree(prepared / library, folder / "m")
    tensor = hostile(copy, rng, EXTRA)
    if tensor and library == "transformers":  # which renames layers
        tensor = tensor.rpartition(".")[2]
    return opened(lambda: load_reduced(copy), tensor)


@kind()
def hf_folders(folder, rng):
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path = folder / "config.json"
    if rng.random() < 0.4:
        heads = transformers.ViTModel, transformers.ViTForImageClassification
        rng.choice(heads)(transformers.ViTConfig(**VIT)).save_pretrained(folder)
        tensor = hostile(folder, rng, EXTRA)
        if tensor and tensor.startswith("classifier"):  # of the head, which is not opened
            tensor = None
        tensor = tensor and tensor.rpartition(".")[2]
        return opened(lambda: open_model(f"hf:{folder}"), tensor)
    name = rng.choice((*CONFIG_MAPPING_NAMES, "evil"))
    files = {
        key: rng.choice(("evil.Evil", "a/b--evil.Evil", 3, None, ["evil.Evil", None]))
        for key in ("AutoConfig", "AutoModel", "AutoTokenizer")
    }
    config = {
        "model_type": name,
        "auto_map": files,
        **{key: value(rng) for key in rng.sample(EXTRA, 2)},
    }
    if rng.random() < 0.5:
        config |= {rng.choice(("num_hidden_layers", "hidden_size", "vocab_size")): value(rng)}
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(CODE)
    save_file({"a.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    if rng.random() < 0.5:
        settings = {"version": 1, "strategy": "tome", "settings": {"r": 1}}
        (folder / "elip.json").write_text(json.dumps(settings))
        return opened(lambda: load_reduced(folder))
    return opened(lambda: open_model(f"hf:{folder}"))


@kind(share=0.5)
def hub_ids(folder, rng):
    pieces = (
        *(
            "owner",
            "name",
            "/",
            "//",
            "..",
            ".",
            "@",
            "@main",
            " ",
            "ü",
            "\0",
            "\n",
            "x" * 300,
            "~",
        ),
        *("hf:", "timm:", "open_clip:", "%2e", "\\", "\udc80", "--", "-", "", "hf-hub:"),
    )
    name = "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
    ways = (
        *(load_model, load_reduced, open_model),
        lambda name: open_model(f"hf:{name}"),
        lambda name: create_model("clip_tiny", name),
    )
    way = rng.choice(ways)
    return opened(lambda: way(name))
