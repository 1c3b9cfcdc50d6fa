"""The command `elip distill`: recover the quality of a reduced model from images without labels."""

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.image_folder import (
    as_option_error,
    image_files,
    open_with_images,
    readable,
    sample_files,
)
from elip_models.saving.locked_folder import locked_folder
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elip_models.commands.image_folder import ImageFiles

HELD_OUT_SHARE, LEAST_HELD_OUT = 0.1, 8
CHECKPOINT, TRIAL = ".distill.safetensors", ".trial"
LEFTOVERS = rf"\.?\{TRIAL}(\.saving-.*)?|\.\{CHECKPOINT}\.\d+\.\d+"
"""Names that a start that was killed may leave."""
COLUMNS = (
    "steps",
    MofNCompleteColumn(),
    BarColumn(),
    "{task.description}",
    TimeRemainingColumn(),
    "left",
)


def distill(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME:TAG, hf:NAME or folder of a model.")
    ],
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its subfolders.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the model; a stopped run continues from its state.")
    ],
    keep: Annotated[
        float | None, typer.Option(help="Mean share of tokens. Without --strategy: 0.5.")
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Strategy, such as merge or evit:keep_ratio=0.6.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 500,
    batch_size: Annotated[int, typer.Option(min=1, max=2**16, help="Images in a step.")] = 8,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of AdamW; default: 5e-6, or 1e-4 with LoRA."),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=1, help="Train LoRA of this rank instead of all weights.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all draws.")] = 0,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
) -> None:
    """Train a reduced model, without labels, to give the dense model's features."""
    if output.is_file() or not output.parent.is_dir():
        raise ConfigError(f"--output: expected a folder, or a new one in a folder, got {output}")
    with locked_folder(output, "--output", marker=CHECKPOINT, leftovers=LEFTOVERS):
        most = round(steps * batch_size / (1 - HELD_OUT_SHARE)) + LEAST_HELD_OUT
        paths = sample_files(image_files(images, least=LEAST_HELD_OUT + 1), most, seed)
        console = Console(stderr=True)
        opened, files = open_with_images(model, paths, console, pretrained=pretrained)
        files.paths = [path for path, _ in readable(files, console)]
        count = max(LEAST_HELD_OUT, round(HELD_OUT_SHARE * len(files)))
        if count >= len(files):
            raise ConfigError(
                f"IMAGES: expected more than {count} readable images, got {len(files)}"
            )
        held_out = set(random.Random(seed).sample(range(len(files)), count))
        pixels = [files[i] for i in held_out]
        files.paths = [path for i, path in enumerate(files.paths) if i not in held_out]
        options = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
        with as_option_error(distill, checkpoint="--output"):
            from elip_models.api import reduce_, unreduce_

            dense = _features(unreduce_(opened), pixels)
            reduce_(opened, strategy, keep=0.5 if keep is None and strategy is None else keep)
            before = _features(opened, pixels)
            _train(opened, model, files, output, console, **options, lora_rank=lora_rank)
        cosines = " before, ".join(
            _mean_cosine(dense, x) for x in (before, _features(opened, pixels))
        )
    Console().print(
        escape(
            f"Mean cosine with the dense features of {count} held-out images: {cosines} after "
            f'{steps} steps; elip_models.load_reduced("{output}") opens the model.'
        ),
        soft_wrap=True,
        highlight=False,
    )


def _train(
    model: "nn.Module",
    spec: str,
    files: "ImageFiles",
    output: Path,
    console: Console,
    **options: Any,
) -> None:
    """Distill the reduced model, with a progress bar, and save it."""
    from elip_models.recovery.distill import distill as train
    from elip_models.saving.open_model import split_spec, split_weights
    from elip_models.saving.saved_reduced import save_reduced

    library, name = split_spec(spec)
    config = split_weights(name)[0] if library == "open_clip" else None
    try:
        save_reduced(model, output / TRIAL, config=config)  # an error comes before the training
    finally:
        shutil.rmtree(output / TRIAL, ignore_errors=True)
    checkpoint = output / CHECKPOINT
    if checkpoint.exists():
        console.print(escape(f"continuing from {checkpoint}"), soft_wrap=True)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=options["steps"])

        def show(step: int, loss: float) -> None:
            bars.update(bar, completed=step, description=f"loss {loss:.4f}")

        train(model, files, checkpoint=checkpoint, progress=show, **options)
    save_reduced(model, output, config=config)
    for file in (*output.glob(f".{CHECKPOINT}.*"), checkpoint):
        file.unlink()


def _features(model: "nn.Module", images: "list[Tensor]") -> "Tensor":
    """Return the output features (n, D) of the image model, in fp32 on the CPU."""
    import torch

    from elip_models.analysis.feature_measures import output_feature
    from elip_models.towers import as_reducible

    model = as_reducible(model).image_model
    device = next(model.parameters()).device
    with torch.no_grad():
        features = [output_feature(model(image[None].to(device))) for image in images]
    return torch.cat(features).float().cpu()


def _mean_cosine(dense: "Tensor", reduced: "Tensor") -> str:
    from elip_models.analysis.feature_measures import cosine
    from elip_models.intervals import bootstrap_interval

    interval = bootstrap_interval(cosine(dense, reduced).double().numpy())
    return f"{interval.mean:.4f} (95% CI {interval.low:.4f} to {interval.high:.4f})"
