"""The command line: `elip train RECIPE [key=value ...]`, `elip eval retrieval | zero-shot |
selection`, `elip visualize`, `elip profile`, `elip study NAME`, `elip convert`, `elip data check`.

What the user can mend is one line on standard error and exit status 2, a bug is a traceback.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape

    from elip_models.data import DataError
    from elip_models.tasks.tables import (
        data_table,
        retrieval_table,
        selection_tables,
        zero_shot_table,
    )
    from elip_models.training.recipe import load_recipe, parse_overrides, recipe_names
    from elip_models.training.run_folder import TrainingError
    from elip_models.validation import ConfigError, blame, extra, names_extra
except ImportError as error:
    sys.stderr.write(f"elip needs the train extra: pip install 'elip-kernels[train]' ({error})\n")
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from elip_models.models.base import PretrainedModel

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
eval_app = typer.Typer(no_args_is_help=True, help="Score a trained model.")
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training on it.")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")


@app.callback()
def elip() -> None:
    """Language-image pre-training with text-guided vision token reduction."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help=f"{', '.join(recipe_names())}, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Such as optim.lr=3e-4 data.train=a.json."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint.")
    ] = False,
) -> None:
    """Train as a recipe says, then report. On several GPUs: torchrun -m elip_models.cli train .."""
    config = load_recipe(recipe, overrides or ())
    from elip_models.training.summary import print_summary
    from elip_models.training.trainer import train as run_training

    console = Console()
    result = run_training(config, resume=resume, console=console)
    if result.is_main_process:
        print_summary(config, result, console)


SavedModel = Annotated[Path, typer.Option(help="Folder of a saved model and its tokenizer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
NumWorkers = Annotated[int, typer.Option(min=0, help="Processes that load images.")]
MaxBadShare = Annotated[float, typer.Option(min=0, max=1, help="Unreadable at most.")]
ScoresFile = Annotated[Path | None, typer.Option(help="Write the scores here, as JSON.")]


@eval_app.command("retrieval")
def eval_retrieval(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="JSON list, tar shards or emoji_scenes:seed=1,size=500.")
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Recall@1/5/10 from image to text and from text to image."""
    from elip_models.data import open_source
    from elip_models.tasks.retrieval import evaluate_retrieval

    trained, tokenizer = _open_trained(model, output)
    with blame("--data"):
        source = open_source(data, image_size=trained.config.image_size)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "max_bad_share": max_bad_share}
    scores = evaluate_retrieval(trained, tokenizer, source, **loading)
    Console().print(retrieval_table(scores))
    _write_scores(asdict(scores), output)


@eval_app.command("zero-shot")
def eval_zero_shot(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="Folder with a folder of images a class, or emoji_classes:size=600.")
    ],
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    max_bad_share: MaxBadShare = 0.05,
    output: ScoresFile = None,
) -> None:
    """Top-1/5 accuracy of classes by their names."""
    from elip_models.data import open_classes
    from elip_models.tasks.zero_shot import evaluate_zero_shot

    trained, tokenizer = _open_trained(model, output)
    with blame("--data"):
        source = open_classes(data, image_size=trained.config.image_size)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "max_bad_share": max_bad_share}
    scores = evaluate_zero_shot(trained, tokenizer, source, **loading)
    Console().print(zero_shot_table(scores))
    _write_scores(asdict(scores), output)


@eval_app.command("selection")
def eval_selection(
    model: SavedModel,
    data: Annotated[
        str, typer.Option(help="emoji_scenes:size=200,clutter=4, or a JSON list with boxes.")
    ],
    strategy: Annotated[
        str | None, typer.Option(help="Such as elip:scorer=exact, tome; default: the model's own.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Samples of --data.")] = 200,
    batch_size: BatchSize = 32,
    output: ScoresFile = None,
) -> None:
    """What a reduction keeps of what captions name, against chance, and what that changes."""
    from elip_models.analysis.selection import selection_scores
    from elip_models.data import open_source
    from elip_models.reduction.strategy_spec import get_strategy

    trained, tokenizer = _open_trained(model, output, ranks=False)
    with blame("--data"):
        source = open_source(data, image_size=trained.config.image_size)
    with blame("--strategy"):
        chosen = get_strategy(strategy).fitted(trained.tower) if strategy else None
    settings = {"limit": count, "batch_size": batch_size}
    scores = selection_scores(trained, source, tokenizer, chosen, **settings)
    Console().print(*selection_tables(scores))
    _write_scores(scores, output)


def _open_trained(
    model: Path, output: Path | None, *, ranks: bool = True
) -> "tuple[PretrainedModel, PreTrainedTokenizerBase]":
    """A saved model that ranks, or any, where it runs fastest, and its tokenizer."""
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output: expected a file in an existing folder, got {output}")
    import torch

    from elip_models.data import load_tokenizer
    from elip_models.models.registry import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with blame("--model"):
        trained = load_model(model).to(device)
        if ranks and not trained.ranks:
            raise ValueError(
                f"expected a model with features to rank, got {type(trained).__name__}, which has "
                "none of images and texts alone"
            )
        return trained, load_tokenizer(str(model))


def _write_scores(scores: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


@app.command()
def visualize(
    model: Annotated[
        str,
        typer.Option(help="Saved folder, timm:NAME, open_clip:NAME/TAG, hf:NAME or our own NAME."),
    ],
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeat for several.")] = None,
    caption: Annotated[list[str] | None, typer.Option(help="Of the image, in order.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Instead: JSON list, tar shards or emoji_scenes:size=500.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Samples of --data.")] = 4,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("kept.png"),
    schedule: Annotated[str | None, typer.Option(help="Such as '2(100%) 10(50%)'.")] = None,
    scorer: Annotated[str | None, typer.Option(help="last, exact, official, mean, 1, ..")] = None,
    fusion: Annotated[float | None, typer.Option(help="1 is vision only, 0 text only.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Load the model's weights.")] = True,
) -> None:
    """Draw the patches that survive each stage, the CLS attention, and how concentrated it is."""
    if bool(image) == (data is not None):
        raise ConfigError("--image: expected images with captions, or else --data, not both")
    if output.suffix != ".png" or not output.parent.is_dir():
        raise ConfigError(f"--output: expected a .png in an existing folder, got {output}")
    from elip_models.analysis.guided import open_guided, read_pairs, read_source
    from elip_models.analysis.visualize import draw_pictures

    pairs = read_pairs(image, caption or []) if image else None
    number = int(scorer) if scorer is not None and scorer.isdecimal() else scorer
    guided = open_guided(
        model, pretrained=pretrained, schedule=schedule, scorer=number, fusion=fusion
    )
    shown = read_source(data, count, guided.tower) if pairs is None else pairs
    for path in draw_pictures(guided, shown, output):
        Console().print(escape(str(path)), soft_wrap=True)


@app.command()
def profile(
    model: Annotated[
        list[str] | None, typer.Option(help="timm:NAME, open_clip:NAME, elip_clip_vit_b16, ..")
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Such as evit, tome:r=13, elip:scorer=exact; default all."),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="Of strategies that say none.")] = None,
    flops: Annotated[
        float | None, typer.Option(help="Share of dense training FLOPs that all are set to.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of tokens, mean over layers, that all are set to.")
    ] = None,
    batch_size: Annotated[list[int], typer.Option(min=1)] = [8],  # noqa: B006, typer copies it
    mode: Annotated[str, typer.Option(help="training, inference or both.")] = "both",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved, of the timing.")] = 10,
    flops_only: Annotated[
        bool, typer.Option("--flops-only", help="No timing, no memory: meta device.")
    ] = False,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also by part of the model: towers, fusion, ..")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The FLOPs of the paper's models.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the table here, as JSON.")] = None,
) -> None:
    """Tokens, FLOPs, time and memory of models under token reduction, against dense."""
    from elip_models.profiling.table import print_profile, settings_of

    settings = settings_of(
        models=model or (),
        strategies=strategy or (),
        schedule=schedule,
        flops=flops,
        keep=keep,
        batch_sizes=batch_size,
        mode=mode,
        dtype=dtype,
        rounds=None if flops_only else rounds,
        parts=parts,
    )
    print_profile(settings, paper=paper, output=output, console=Console())


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A built-in study, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the recipe, for every arm."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Arms, such as dense,tome.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List runs and their cost.")] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file of all numbers.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write this page, run nothing.")] = None,
) -> None:
    """Train and compare the arms of a study over seeds; what is finished is not run again."""
    from elip_models.study.command import Progress, write_page
    from elip_models.study.plan import RUNS, load_study, plan, seeds_of

    chosen = load_study(name, parse_overrides(overrides or (), "optim.steps=100"))
    runs = plan(chosen, only=only.split(",") if only else (), seeds=seeds_of(seeds))
    found = results or RUNS / f"{chosen.name}.json"
    progress = Progress(chosen, runs, found, Console())
    if page is not None:
        write_page(found, page)
    elif dry_run:
        progress.plan()
    else:
        progress.run()


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="File or folder of ALBEF, BLIP, METER, open_clip, transformers.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the model: activation=quick_gelu"),
    ] = None,
    to: Annotated[str, typer.Option(help="ours, hf or open_clip.")] = "ours",
    kind: Annotated[str | None, typer.Option(help="Of the source; default: by its names.")] = None,
    architecture: Annotated[
        str | None, typer.Option(help="Of BLIP in transformers: BlipForImageTextRetrieval, ..")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Interpolate position embeddings to it.")
    ] = None,
    allow_missing: Annotated[
        list[str] | None, typer.Option(help="Our names that may be missing, such as 'itm_head.*'.")
    ] = None,
    allow_unexpected: Annotated[
        list[str] | None, typer.Option(help="Names of the source to leave aside.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name: its ids, and its files; default: the files of the source."
        ),
    ] = None,
) -> None:
    """Turn another library's checkpoint into one of our models, or ours into theirs."""
    from elip_models.checkpoints.export import save_as
    from elip_models.checkpoints.load import convert_checkpoint
    from elip_models.data import load_tokenizer

    fields = parse_overrides(overrides or (), "vision_heads=12")
    fields |= {"image_size": image_size} if image_size else {}
    with blame("convert"):
        loaded = load_tokenizer(tokenizer) if tokenizer else None
        has_own = loaded is None and (source / "tokenizer_config.json").is_file()
        beside = load_tokenizer(source) if has_own else loaded
        model = convert_checkpoint(
            source,
            kind=kind,
            tokenizer=loaded,
            allow_missing=allow_missing or (),
            allow_unexpected=allow_unexpected or (),
            **fields,
        )
        save_as(model, output, to, architecture=architecture, tokenizer=beside)
    Console().print(escape(f"{type(model).__name__}: {output}"), soft_wrap=True)


@data_app.command("check")
def check_data(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC...", help="JSON list, tar shards, emoji_scenes:size=500."),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Read only the first samples.")] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Of built-in scenes.")] = 224,
) -> None:
    """Read every sample of the sources; exit status 1 where some cannot be read."""
    from elip_models.data import check_source, open_source

    with blame("SPEC"):
        source = open_source(specs, image_size=image_size)
    console, named = Console(), escape(", ".join(specs))
    with console.status(f"reading {named}"):
        report = check_source(source, limit)
    captions = [text for i in range(report.seen) for text in source.captions(i)]
    console.print(data_table(named, len(source), report, captions))
    if report.reasons:
        console.print(escape(report.summary()), soft_wrap=True)
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script `elip`; `arguments` default to those of the process."""
    try:
        with extra("this"):
            app(args=arguments, prog_name="elip")
    except ImportError as error:
        if not names_extra(error):
            raise
        _exit_with(str(error))
    except (ConfigError, DataError, TrainingError) as error:
        _exit_with(str(error))
    raise SystemExit(0)


def _exit_with(message: str) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True).print(
        f"[bold red]error:[/] {escape(line)}", soft_wrap=True, highlight=False
    )
    raise SystemExit(2)


if __name__ == "__main__":
    main()
