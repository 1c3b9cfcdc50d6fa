"""The command `elip calibrate`: the fastest reduction that the user's own task allows."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from elip_models.commands.calibration_task import TASKS, TASKS_OF, Opening, Source, prepare
from elip_models.commands.image_folder import as_option_error
from elip_models.saving.locked_folder import locked_folder
from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape

if TYPE_CHECKING:
    from elip_models.calibration.results import Results
    from elip_models.commands.calibration_task import Prepared

MARKER, OUTPUTS = "run.json", "outputs"
"""What a run writes first, and the folder of its outputs, see `calibration/outputs.py`."""
DTYPES = ("fp32", "bf16", "fp16")
BEST, REPORT, DISTILLED = "best.json", "report.html", "distilled"
ADVICE = (
    "The cosine and the neighbours of features describe a change; they do not tell what a task "
    "loses. --labels, --captions, --masks or --questions judge by a task."
)


def calibrate(
    model: Annotated[
        str, typer.Argument(help="timm:NAME, open_clip:NAME:TAG, hf:NAME or folder of a model.")
    ],
    images: Annotated[Path, typer.Argument(help="Folder of images, searched with its subfolders.")],
    task: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TASKS)}, or FILE.py:function of your own; default: found by the "
            "model and the data."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Classes of the images: 'folders' if each class has a folder, or a CSV file of "
            "lines image,label."
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="CSV file of lines image,caption, or JSON rows: judge by retrieval."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder of a PNG of class indices for each image: judge by mIoU."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="JSON rows of image, question, answers, for a multimodal language model."
        ),
    ] = None,
    score: Annotated[
        str, typer.Option(help="Of answers: 'exact match', 'ANLS' or 'VQA accuracy'.")
    ] = "exact match",
    prompt: Annotated[
        str | None,
        typer.Option(help="Text with {question}, for a processor without a chat template."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest loss: 0.01 is one point of accuracy, or of the measure.")
    ] = 0.01,
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Setting to measure beside, such as 'evit 0.7'; may be repeated."),
    ] = None,
    distill: Annotated[
        int, typer.Option(min=0, help="Also train the next cheaper setting for this many steps.")
    ] = 0,
    count: Annotated[
        int | None,
        typer.Option(min=8, help="Images, drawn at random: by default 200, or 2,000 with classes."),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option(min=0, help="Use as many of these images as about this time allows; 0: all."),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw and of the halves.")] = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, max=2**16, help="Images in a batch, for outputs and times.")
    ] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, as you deploy.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; default: the GPU if there is one.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Time compiled models.")] = False,
    class_token_only: Annotated[
        bool,
        typer.Option(
            "--class-token-only",
            help="You use no patch features: the last block computes the class token alone.",
        ),
    ] = False,
    every: Annotated[
        bool, typer.Option("--every", help="Try every strategy at every cost, without the search.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the report and the choice; a stopped run goes on.")
    ] = Path("calibrated"),
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
    metric: Annotated[str | None, typer.Option(help="Deprecated name of --task.")] = None,
) -> None:
    """Find the fastest reduction whose loss by your own measure is within a tolerance."""
    console = Console(stderr=True)
    if metric is not None:
        _print(console, "warning: --metric is now --task; version 0.3.0 removes --metric")
        task = task or metric
    loss = _own_function(task) if task is not None and ":" in task else None
    if loss is None and task not in (None, *TASKS):
        raise ConfigError(
            f"--task: expected {', '.join(TASKS)} or FILE.py:function, got {shortened(task)}"
            f"{did_you_mean(task, TASKS)}"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)}, got {shortened(dtype)}")
    if output.suffix in (".json", ".html", ".md") or output.is_file():
        raise ConfigError(f"--output: expected a folder, or a name for a new one, got {output}")
    options = {"tolerance": tolerance, "compare": compare or (), "distill": distill, "seed": seed}
    options |= {"batch_size": batch_size, "compile": compile, "every": every}
    options |= {"class_token_only": class_token_only, "minutes": minutes}
    with locked_folder(output, "--output", marker=MARKER), _mistakes_undone(output):
        with as_option_error(calibrate, folder="--output"):
            prepared = prepare(
                Opening(model, pretrained, device),
                Source(images, labels, captions, masks, questions),
                loss or task,
                count=count,
                seed=seed,
                batch_size=batch_size,
                answering={"score": score, "prompt": prompt},
                console=console,
            )
            results = _run(prepared, model, output, dtype, options, console)
        results = replace(results, model=model)
        results.save(output)
    if prepared.task.name in TASKS_OF[None]:
        _print(console, ADVICE)
    _print(Console(), f"{results.table()}\n{results.sentence()}")
    if not results.usable:
        lack = "is confirmed to be within the tolerance"
        if results.chosen is not None and not results.saves_time:
            lack = "within the tolerance saves time on this machine"
        _print(console, f"error: {output / BEST} was not written, since no setting {lack}")
        raise typer.Exit(1)
    _print(
        Console(),
        f'{output / REPORT} shows the result. Call elip_models.reduce_(model, "{output / BEST}")',
    )


@contextmanager
def _mistakes_undone(output: Path) -> Iterator[None]:
    """Remove what a run has stored if its data or options are wrong, unless it goes on."""
    is_new = not (output / MARKER).exists()
    try:
        yield
    except ConfigError:
        if is_new:
            (output / MARKER).unlink(missing_ok=True)
            shutil.rmtree(output / OUTPUTS, ignore_errors=True)
        raise


def _run(
    prepared: "Prepared",
    spec: str,
    output: Path,
    dtype: str,
    options: dict[str, Any],
    console: Console,
) -> "Results":
    """Calibrate with a line of progress."""
    from elip_models.calibration.calibrate import calibrate as run
    from elip_models.embedding.encoder import DTYPES as PRECISIONS
    from elip_models.saving.open_model import split_spec, split_weights
    from elip_models.saving.saved_reduced import save_reduced

    library, name = split_spec(spec)
    config = split_weights(name)[0] if library == "open_clip" else None
    with console.status("dense outputs") as status:
        return run(
            prepared.model,
            task=prepared.task,
            dtype=PRECISIONS[dtype],
            folder=output,
            names=prepared.names,
            save=lambda trained: save_reduced(trained, output / DISTILLED, config=config),
            progress=lambda text: status.update(escape(text)),
            announce=lambda text: _print(console, text),
            **options,
        )


def _print(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)


def _own_function(text: str) -> Callable[..., Any]:
    """Return the function that FILE.py:function names."""
    file, _, name = text.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(
            f"--task: expected FILE.py:function with a Python file, got {shortened(text)}"
        )
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"--task: expected a function in {path}, got none named {name!r}")
    return function
