"""Hostile arguments of the commands that read images or write models."""

import contextlib
import io
import json

import timm
import torch

from elip_models.cli import main
from tests.fuzz.harness import Loss, kind
from tests.fuzz.hostile_json import value
from tests.fuzz.stored_cases import save_language_model
from tests.fuzz.strategy_cases import VALUES
from tests.helpers.damage import damaged, picture

# A whole calibration or export takes longer than a case: labels do not fit, and models are hostile.
COMMANDS = {
    "embed": ["{images}", "--model", "{model}", "--output", "out", "--workers", "0"],
    "search": ["{images}", "a dog"],
    "calibrate": ["{model}", "{images}", "--labels", "{file}", "--output", "out"],
    "distill": ["{model}", "{images}", "--output", "out", "--steps", "1", "--batch-size", "1"],
    "export": ["{model}", "out.onnx"],
}
OPTIONS = {
    "embed": "reduce keep preprocess min-cosine precision device image-column key-column "
    "keep-columns shard-size embedding-dtype output",
    "search": "top model device",
    "calibrate": "labels task compare dtype device tolerance count seed output",
    "distill": "strategy keep lr lora-rank seed output",
    "export": "strategy keep batch image-size",
}
MODELS = ("clip_tiny", "timm:nothing", "hf:{language}", "{language}", "{images}", "timm:test_vit")


def save_inputs(folder):
    (folder / "images").mkdir()
    for i in range(9):
        (folder / "images" / f"{i}.png").write_bytes(picture(i, size=(20, 20)))
    save_language_model(folder / "language")
    torch.save(timm.create_model("test_vit").state_dict(), folder / "vit.pt")


def _hostile_file(folder, rng, prepared):
    """Write a file that an option may name; return its path."""
    path = folder / f"file.{rng.choice(('json', 'csv', 'py', 'pt'))}"
    whole = json.dumps(value(rng)).encode(), (prepared / "vit.pt").read_bytes()
    path.write_bytes(rng.choice((damaged(rng.choice(whole), rng), *whole[:1])))
    return path


@kind(share=2, prepare=save_inputs)
def commands(folder, rng, prepared):
    name = rng.choice(list(COMMANDS))
    file = _hostile_file(folder, rng, prepared)
    places = {"images": prepared / "images", "language": prepared / "language", "file": file}
    models = (*MODELS, f"timm:test_vit:{file}", f"hf:{folder}", rng.choice(VALUES))
    model = rng.choice(models).replace("{language}", str(places["language"]))
    if name != "export" and rng.random() < 0.7:
        model = f"timm:test_vit:{prepared / 'vit.pt'}"
    arguments = [part.format(model=model, **places) for part in COMMANDS[name]]
    values = (rng.choice(VALUES), str(file), "0.7", "8", str(prepared / "images"))
    arguments += [f"--{rng.choice(OPTIONS[name].split())}", rng.choice(values)]
    errors, status = io.StringIO(), None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main([name, *arguments])
    except SystemExit as exit_:
        status = exit_.code or 0
    text = errors.getvalue()
    if status == 0:
        return "read"
    if status not in (1, 2) or "Traceback" in text or "rror" not in text:
        raise Loss(f"{name} {arguments}: exit status {status}: {text[-300:]}")
    return "refused"
