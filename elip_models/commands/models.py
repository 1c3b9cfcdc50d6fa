"""The command `elip models`: which models can be reduced, and by which strategy."""

from typing import Annotated

from elip_models.validation import ConfigError, did_you_mean, require_extra, shortened

with require_extra("elip_models.commands"):
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Column, Table

FAMILIES = (
    ("timm", "most ViTs, DeiT, EVA-02, SigLIP, DINOv2", "timm:vit_base_patch16_224"),
    ("open_clip", "CLIP, CoCa, SigLIP and EVA-02 with a ViT", "open_clip:ViT-B-16"),
    ("transformers", "CLIP, SigLIP, ViT, DeiT, BLIP, DINOv2", "hf:openai/clip-vit-base-patch16"),
)
"""Library, what of it can be reduced, and an example for `open_model`."""


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="FILTER", help="Name in timm, with * for any part, such as 'vit_small_*'."
        ),
    ] = None,
    language: Annotated[
        bool, typer.Option("--language", help="List the multimodal language models.")
    ] = False,
) -> None:
    """List the models that can be reduced; with FILTER, check timm models by name."""
    if language:
        if pattern is not None:
            raise ConfigError(
                f"FILTER: expected none with --language, got {shortened(pattern)}; leave it out"
            )
        _print_language_models()
        return
    if pattern is None:
        _print_families()
        return
    import timm

    names = timm.list_models(pattern)
    if not names:
        raise ConfigError(
            "FILTER: expected a name of timm.list_models(), or a pattern such as 'vit_small_*', "
            f"got {shortened(pattern)}{did_you_mean(pattern, timm.list_models())}"
        )
    _print_support(names)


def _print_families() -> None:
    from elip_models.saving.model_registry import registered_names

    table = Table("library", "models", Column("example", no_wrap=True))
    for row in FAMILIES:
        table.add_row(*row)
    table.add_row("this library", escape(", ".join(registered_names())), "elip_clip_vit_b16")
    console = Console()
    console.print(table)
    console.print("elip models 'vit_*' checks timm models by name", highlight=False)
    console.print("elip models --language lists multimodal language models", highlight=False)


def _print_language_models() -> None:
    """Print which model types of transformers have a language model that can be reduced."""
    import transformers

    from elip_models.vlm.unsupported import language_support

    support = language_support()
    names = [name for name, reason in support.items() if reason is None]
    console = Console(soft_wrap=True, highlight=False)
    version = transformers.__version__
    console.print(f"{len(names)} of {len(support)} types of transformers {version} can be reduced:")
    console.print(", ".join(names))
    for reason in dict.fromkeys(filter(None, support.values())):
        others = ", ".join(name for name in support if support[name] == reason)
        console.print(escape(f"cannot be reduced: {others}: {reason}"))


def _print_support(names: list[str]) -> None:
    """Print the default strategy of each model, the strategies that fail, and the reasons."""
    from elip_models.analysis.supported_models import timm_support

    table = Table(Column("model", no_wrap=True), "default strategy", "not by", "with", "why")
    reasons: list[str] = []

    def number(reason: str) -> int:
        if reason not in reasons:
            reasons.append(reason)
        return reasons.index(reason) + 1

    for name in track(names, "checking", console=Console(stderr=True), transient=True):
        support = timm_support(name)
        if support.refusal is not None:
            table.add_row(name, "none", "all", "", str(number(support.refusal)))
            continue
        failures = {strategy: why for strategy, why in support.reasons.items() if why is not None}
        notes = sorted({number(reason) for reason in failures.values()})
        table.add_row(
            name, support.default, ", ".join(failures), support.flag, ", ".join(map(str, notes))
        )
    console = Console()
    console.print(table)
    for i, reason in enumerate(reasons, 1):
        console.print(f"{i}. {escape(reason)}", highlight=False)
