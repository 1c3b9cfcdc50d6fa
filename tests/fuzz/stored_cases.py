"""Embeddings, their sources, the state of a distillation, and saved language models."""

import json
import shutil
import warnings
from pathlib import Path

import pyarrow
import timm
import torch
from pyarrow import parquet

import elip_models
from elip_models.embedding.encoder import open_encoder
from elip_models.embedding.search import build_index, search
from elip_models.embedding.source import open_images, read_payload
from elip_models.images import SampleError
from elip_models.integrations.hf_trainer import ReductionCallback
from elip_models.recovery.distill import distill
from elip_models.saving.files import (
    file_sha256,
    read_checked,
    read_state,
    write_checked,
    write_tensors,
)
from elip_models.validation import ConfigError
from tests.fuzz.harness import Loss, kind, refused
from tests.fuzz.hostile_json import change_json, places, value
from tests.fuzz.open_model_cases import opened
from tests.fuzz.strategy_cases import VALUES
from tests.helpers.damage import damaged, picture, shard
from tests.helpers.tiny_run import own_process
from tests.helpers.towers import plain_vit
from tests.vlm.models import build

SMALL = {"batch_size": 2, "shard_size": 2, "workers": 0, "check": 0}
STATE = {}
"""What `prepare` makes once and a forked case cannot make in time."""

LISTS = ("[" * 10**5, "[[1e400, 0, 0]]", '[[99, "", false]]', '[[-1, "", false]]')
"""Forged lists of skipped images."""


def contents(folder):
    paths = sorted(Path(folder).rglob("*"))
    return {path: path.read_bytes() for path in paths if path.is_file() and path.name != ".lock"}


def relative(folder):
    return {
        path.relative_to(folder).as_posix(): content for path, content in contents(folder).items()
    }


def hits(folder, query):
    return [
        (hit.key, round(hit.similarity, 4))
        for hit in search(folder, query, model=STATE["encoder"], top=3).hits
    ]


def save_embeddings(folder):
    torch.manual_seed(0)
    (folder / "images").mkdir()
    for i in range(6):
        (folder / "images" / f"{i}.png").write_bytes(picture(i, size=(40 + i, 30)))
    (folder / "images" / "empty.png").write_bytes(b"")
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pt")
    STATE["encoder"] = open_encoder(f"timm:test_vit:{folder / 'vit.pt'}", device="cpu")
    with own_process():  # a case is a process that has not used accelerate
        elip_models.embed(STATE["encoder"], folder / "images", folder / "whole", **SMALL)
    STATE["hits"] = hits(folder / "whole", folder / "images" / "3.png")


def forged(path, rng):
    """Change a JSON file or the metadata of a Parquet file, with a checksum that fits."""
    if path.suffix == ".parquet":
        table, texts = parquet.read_table(path), (json.dumps(value(rng)), *LISTS)
        stored = table.schema.metadata[b"elip"].decode()  # which would be no damage
        text = rng.choice([each for each in texts if each != stored])
        table = table.replace_schema_metadata({b"elip": text.encode()})
        parquet.write_table(table, path)
        if path.parent.name == "images":
            name = f"images/{path.name}"
            checksum = path.parents[1] / "checksums" / f"images-{path.name}.sha256"
            checksum.write_text(f"{file_sha256(path)}  {name}\n")
        return
    content = read_checked(path)
    owner, key = rng.choice(places(content))
    owner[key] = value(rng)
    write_checked(path, content)


def damage_folder(folder, rng, forge):
    """Damage, swap, forge or remove one file of a folder."""
    paths = sorted(contents(folder))
    path, other = rng.choice(paths), rng.choice(paths)
    way = rng.randrange(6)
    if way == 0:
        path.unlink()
    elif way == 1:
        shutil.copy(other, path) if path != other else path.write_bytes(b"")
    elif way == 2 and path.suffix == ".json":
        change_json(path, rng)
    elif way == 3 and path.suffix in forge:
        forge[path.suffix](path, rng)
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))


@kind(share=3, prepare=save_embeddings)
def embeddings(folder, rng, prepared):
    out, query = shutil.copytree(prepared / "whole", folder / "out"), prepared / "images" / "3.png"
    with_index = rng.random() < 0.3
    if with_index:
        build_index(out)
    damage_folder(out, rng, {".json": forged, ".parquet": forged})
    (out / ".notes.1").write_text("mine")
    try:
        if rng.random() < 0.5:
            elip_models.embed(STATE["encoder"], prepared / "images", out, **SMALL)
            shutil.rmtree(out / "index", ignore_errors=True)
            written = relative(out)
            if written.pop(".notes.1") != b"mine" or written != relative(prepared / "whole"):
                raise Loss("other files than those of a whole run")
        elif hits(out, query) != STATE["hits"]:
            raise Loss("other hits than in the whole folder")
    except ConfigError as error:
        return refused(error, ":")
    return "read"


NAMES = ("a.png", "0.png", "key", "x\0y", "../0.png", "\udcff", "file:///0.png", *VALUES)
URLS = ("dir://", "data:,", "memory://", "zip://a::", "reference://", "ftp://[", "https://[::1]:0/")
COLUMNS = ("image", "image", "path", "key", "url", "label", "")


def _table(folder, rng):
    """Write a list of images with hostile columns and cells; return its path."""
    columns = [rng.choice(COLUMNS) for _ in range(rng.randrange(1, 4))]
    cells = ("0.png", "1.png", rng.choice(NAMES))
    rows = [[rng.choice(cells) for _ in columns] for _ in range(rng.randrange(4))]
    path = folder / f"list{rng.choice(('.csv', '.jsonl', '.json', '.parquet'))}"
    if path.suffix == ".parquet":
        kind_of_cell = rng.choice((pyarrow.binary(), pyarrow.string()))
        cells = [[row[i].encode(errors="replace") for row in rows] for i in range(len(columns))]
        arrays = [pyarrow.array(column, kind_of_cell) for column in cells]
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names=columns), path)
        return path
    entries = [dict(zip(columns, row, strict=True)) for row in rows]
    entries += [value(rng)] * rng.randrange(2)
    texts = {
        ".csv": lambda: "\n".join(",".join(row) for row in [columns, *rows]),
        ".json": lambda: json.dumps(entries),
        ".jsonl": lambda: "\n".join(map(json.dumps, entries)),
    }
    path.write_bytes(texts[path.suffix]().encode(errors="surrogateescape"))
    return path


@kind(share=3)
def image_sources(folder, rng):
    for i in range(2):
        (folder / f"{i}.png").write_bytes(picture(i))
    way = rng.randrange(4)
    if way == 0:
        source = rng.choice(URLS) + rng.choice(NAMES)
    elif way == 1:
        source = shard(folder / "a.tar")
        source.write_bytes(damaged(source.read_bytes(), rng))
    else:
        source = _table(folder, rng)
        if rng.random() < 0.2 and source.stat().st_size:
            source.write_bytes(damaged(source.read_bytes(), rng))
    columns = {"image_column": None, "key_column": None, "keep_columns": ()}
    if rng.random() < 0.3:
        columns[rng.choice(list(columns))] = rng.choice(("image", "label", "key", "nothing"))
    try:
        listed = open_images(source, **columns)
        payloads = [*listed.payloads(0, len(listed))]
    except ConfigError as error:
        return refused(error, ":")
    if len(payloads) != len(listed) or len({*listed.keys}) != len(listed):
        raise Loss("other images than keys")
    for payload in payloads:
        try:
            read_payload(payload)
        except SampleError as error:
            refused(error)
    json.dumps(listed.described()).encode()
    return "read"


def save_state(folder):
    torch.manual_seed(0)
    STATE["dense"], STATE["pictures"] = plain_vit(depth=2).eval(), torch.randn(4, 3, 48, 48)
    options = {"keep": 0.7, "steps": 50, "batch_size": 1, "checkpoint": folder / "state"}
    distill(elip_models.reduce_(plain_vit(depth=2)), STATE["pictures"], **options)


def _forged_state(path, rng):
    state, tensors = read_state(path)
    if rng.random() < 0.5:
        owner, key = rng.choice(places(state))
        owner[key] = value(rng)
    else:
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        new = (tensor[None], tensor.half(), tensor * torch.nan, torch.ones(()), torch.ones(1))
        if rng.random() < 0.8:
            tensors[rng.choice((name, "x", "step.x"))] = rng.choice(new)
    write_tensors(path, tensors, state)


@kind(share=2, prepare=save_state)
def distillation_states(folder, rng, prepared):
    path, model = Path(shutil.copy(prepared / "state", folder)), STATE["dense"]
    damage_folder(folder, rng, {"": _forged_state})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"keep": 0.7, "steps": 50, "batch_size": 1, "checkpoint": path}
    try:
        if path.is_file():
            distill(model, STATE["pictures"], **options)
    except (TypeError, ValueError) as error:
        after = model.state_dict()
        if not all(torch.equal(tensor, after[name]) for name, tensor in before.items()):
            raise Loss("a refused state changed the weights") from error
        return refused(error, "checkpoint", "expected")
    return "read"


def save_language_model(folder):
    model = elip_models.reduce_(build("llava")[0].float(), "diverse", keep=5)
    elip_models.reduce_(elip_models.reduce_(model, "fastv:layer=1"), "tome").save_pretrained(folder)


@kind(share=1, prepare=save_language_model)
def language_models(folder, rng, prepared):
    copy = shutil.copytree(prepared, folder / "model")
    config = json.loads((copy / "config.json").read_text())
    owner, key = rng.choice(places(config["elip"]))
    owner[key] = rng.choice((value(rng), [owner[key]] * rng.choice((2, 500)), {}))
    (copy / "config.json").write_text(json.dumps(config))
    return opened(lambda: elip_models.load_reduced(copy))


@kind(share=1)
def callbacks(folder, rng):
    strategies = (*VALUES, "tome", "diverse", "fastv:layer=1", "patch_dropout", None, 3)
    options = {rng.choice(("keep", "r", "until", "x")): rng.choice((0.7, 2, -1, None, "1", 10**30))}
    options = rng.choice((options, {}))
    model, state = plain_vit(depth=4), type("State", (), {"global_step": 3, "max_steps": 9})()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            callback = ReductionCallback(rng.choice(strategies), **options)
            callback.on_step_begin(None, state, None, model=model)
            with torch.no_grad():
                finite = model(torch.zeros(1, 3, 48, 48)).isfinite().all()
    except (TypeError, ValueError) as error:
        return refused(error)
    if not finite:
        raise Loss("an output that is not finite")
    return "read"
