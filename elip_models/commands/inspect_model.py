"""The commands `elip visualize` and `elip profile`: pictures and costs of a reduction."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from elip_models.validation import (
    ConfigError,
    as_config_error,
    check_output,
    require_extra,
    shortened,
)

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from elip_models.analysis.visualize_inputs import CaptionedImages
    from elip_models.towers import Tower


def visualize(
    model: Annotated[
        str,
        typer.Option(
            help="Folder of a saved model, timm:NAME, open_clip:NAME:TAG, hf:NAME or our own NAME."
        ),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image file; for a video model a folder of frames or a GIF. May be repeated."
        ),
    ] = None,
    caption: Annotated[
        list[str] | None, typer.Option(help="Caption of each image, in order, if a text guides.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Instead of images: JSON list, tar shards or emoji_scenes:size=500."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Number of samples of --data.")] = 4,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("kept.png"),
    strategy: Annotated[
        str | None,
        typer.Option(help="Strategy, such as tome:r=8; default: the model's own, or merge."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Mean share of tokens over the layers.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule, such as '2(100%) 10(50%)'.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Image side in pixels; default: the model's own.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
) -> None:
    """Draw kept and merged patches of images or clips, the CLS attention and its concentration."""
    files = image or []
    if bool(files) == (data is not None):
        raise ConfigError("--image: expected images, or else --data, not both")
    check_output("--output", output)
    if output.suffix != ".png":
        raise ConfigError(f"--output: expected a name ending in .png, got {output}")
    from elip_models.analysis import visualize_inputs
    from elip_models.analysis.pictures import draw_pictures

    captions = visualize_inputs.check_pairs(files, caption or [])
    visualized = visualize_inputs.open_visualized_model(
        model,
        pretrained=pretrained,
        strategy=strategy,
        keep=keep,
        schedule=schedule,
        image_size=image_size,
    )
    if data is None:
        shown = visualize_inputs.read_pairs(files, captions, visualized.tower.num_frames)
    else:
        shown = read_source(data, count, visualized.tower)
    for path in draw_pictures(visualized, shown, output):
        Console().print(escape(str(path)), soft_wrap=True)


def read_source(spec: str, count: int, tower: "Tower") -> "CaptionedImages":
    """Read the first `count` readable samples of a source, with their first captions."""
    from elip_models.pretraining.data import open_source
    from elip_models.pretraining.data.read_errors import readable_samples

    if tower.num_frames > 1:
        raise ConfigError(
            f"--data: expected --image with a clip for a model that reads {tower.num_frames} "
            f"frames, got {shortened(spec)}, whose samples are images"
        )
    with as_config_error("--data", inner="spec"):
        source = open_source(spec, image_size=max(tower.image_size))
        samples = readable_samples(source, range(len(source)))
        shown = [(sample.image, sample.captions[0]) for sample in islice(samples, count)]
    if not shown:
        raise ConfigError(f"--data: expected a readable sample, got none in {spec!r}")
    return shown


def profile(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model: timm:NAME, open_clip:NAME, hf:NAME, elip_clip_vit_b16, ..; repeatable."
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Strategy, such as evit, tome:r=13 or elip:scorer=exact; default: all."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Schedule of strategies without their own.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option(help="Set all strategies to this share of dense training FLOPs.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Set all strategies to this mean share of tokens over the layers."),
    ] = None,
    batch_size: Annotated[
        list[int],
        typer.Option(min=1, max=2**20, help="Images or pairs in a step; repeat for several."),
    ] = [8],  # noqa: B006, typer copies it
    mode: Annotated[str, typer.Option(help="Mode: training, inference or both.")] = "both",
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: fp32, bf16 or fp16.")
    ] = "fp32",
    rounds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Interleaved rounds of the timing.")
    ] = 10,
    flops_only: Annotated[
        bool, typer.Option("--flops-only", help="Only count FLOPs, on the meta device.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also show FLOPs by component: towers, fusion, ..")
    ] = False,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Instead: find the largest training batch.")
    ] = False,
    memory: Annotated[str, typer.Option(help="Memory for --max-batch.")] = "16GB",
    output: Annotated[Path | None, typer.Option(help="JSON file for the table.")] = None,
) -> None:
    """Compare tokens, FLOPs, time and memory of models with token reduction to dense."""
    from elip_models.profiling.table import ProfileSettings, print_profile

    if strategy is None:
        strategy = ["elip:scorer=exact"] if max_batch else []
    settings = ProfileSettings(
        models=tuple(dict.fromkeys(model or ())),
        strategies=tuple(strategy),
        schedule=schedule,
        flops=flops,
        keep=keep,
        batch_sizes=tuple(dict.fromkeys(batch_size)),
        mode=mode,
        dtype=dtype,
        rounds=None if flops_only else rounds,
        parts=parts,
    )
    if max_batch:
        from elip_models.profiling.max_batch import print_largest_batches

        print_largest_batches(settings, memory, output=output, console=Console())
    else:
        print_profile(settings, output=output, console=Console())
