"""Configs of other libraries and of ours, and tokenizers: JSON with values of other kinds."""

import copy
import json
import shutil

from elip_models.api import reduce_
from elip_models.pretraining.checkpoints.export import save_as
from elip_models.pretraining.checkpoints.load import convert_checkpoint
from elip_models.pretraining.data import load_tokenizer, train_tokenizer
from elip_models.pretraining.models.registry import create_model
from elip_models.reduction.serialization import settings_of
from elip_models.reduction.strategies import STRATEGIES
from tests.fuzz.harness import Loss, kind, refused
from tests.fuzz.weight_file_cases import (
    HEADS,
    NUMBERS,
    OTHERS,
    SIZES,
    SOURCES,
    SPECIAL,
    check_values,
)
from tests.helpers.damage import damaged
from tests.helpers.towers import plain_vit


def save_folders(folder):
    """Tiny models as folders of this library and of others, with a tokenizer."""
    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    for family in SOURCES:
        model = create_model(f"{family}_tiny", vocab_size=320, **SIZES, **SPECIAL[family])
        model.save_pretrained(folder / family, tokenizer=tokenizer)
        if family == "clip":
            save_as(model, folder / "hf_clip", "hf", tokenizer=tokenizer)
            save_as(model, folder / "open_clip", "open_clip")


def _replace_value(content, rng):
    """Replace a value somewhere in JSON by one of another kind."""
    whole = [content]
    holder, key = whole, 0
    while isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.85:
        holder = holder[key]
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    if isinstance(holder, dict) and rng.random() < 0.15:
        del holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice((*NUMBERS, *OTHERS)))  # or a list may hold itself
    return whole[0]


def _damage_json(path, rng):
    if rng.random() < 0.75:
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError):  # damaged before
            return
        for _ in range(rng.choice((1, 1, 2, 4))):
            content = _replace_value(content, rng)
        path.write_text(json.dumps(content))
    elif rng.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), rng))
    else:
        texts = (
            "[" * 10**5,
            '{"a":' * 10**5,
            "",
            "null",
            "\0",
            "[]",
            "3",
            '"a"',
            "9" * 5000,
            "\xff",
        )
        path.write_text(rng.choice(texts), encoding="latin-1")


@kind(share=1, prepare=save_folders)
def library_folders(folder, rng, prepared):
    name = rng.choice(("hf_clip", "open_clip"))
    source = shutil.copytree(prepared / name, folder / "model")
    for _ in range(rng.choice((1, 1, 2))):
        _damage_json(rng.choice(sorted(source.glob("*config*.json"))), rng)
    if rng.random() < 0.1:
        (source / "preprocessor_config.json").write_text('{"image_mean": ["a"], "image_std": 3}')
    try:
        model = convert_checkpoint(source, **(HEADS if rng.random() < 0.3 else {}))
    except (ValueError, FileNotFoundError) as error:
        return refused(error, ":")
    check_values(model, "clip", {})
    return "read"


@kind(share=1, prepare=save_folders)
def tokenizers(folder, rng, prepared):
    source = shutil.copytree(prepared / "clip", folder / "tokenizer")
    (source / "model.safetensors").unlink()
    for _ in range(rng.choice((1, 1, 2))):
        _damage_json(rng.choice(sorted(source.iterdir())), rng)
    if rng.random() < 0.2:
        rng.choice(sorted(source.iterdir())).unlink()
    if rng.random() < 0.1:
        (source / "config.json").write_text('{"model_type": "bert", "auto_map": {"a": "b.c"}}')
    try:
        tokenizer = load_tokenizer(source)
    except (ValueError, FileNotFoundError) as error:
        return refused(error, str(source))
    ids = tokenizer("a red dog").input_ids
    if ids[-1] != tokenizer.eos_token_id:
        raise Loss(f"no end of text: {ids}")
    return "read"


@kind()
def strategy_files(folder, rng):
    """The files of `elip calibrate`, which `reduce_` reads."""
    strategy = rng.choice(list(STRATEGIES.values()))()
    file = folder / "calibrated.json"
    file.write_text(json.dumps({**settings_of(strategy), "calibration": {"images": 9}}))
    _damage_json(file, rng)
    model = plain_vit(depth=4)
    try:
        reduce_(model, str(file))
    except (TypeError, ValueError) as error:
        if len(str(error)) > 3000:
            raise Loss(f"a message of {len(str(error))} characters") from error
        return refused(error)
    return "read"
