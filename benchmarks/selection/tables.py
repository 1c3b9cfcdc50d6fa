"""Tables of `python -m benchmarks.selection`."""

from typing import Any

from rich.table import Table

STAGE_COLUMNS = {
    "kept": "named kept %",
    "purity": "purity %",
    "changed_by_another_caption": "changed by another caption %",
    "changed_by_another_image": "by another image's %",
    "agrees": "agrees with exact %",
}
WHOLE_ROWS = {
    "lost": "1 - cos(reduced, dense)",
    "all_patches": "matching score, all patches",
    "insertion": "insertion, area",
    "random": "in random order",
    "deletion": "deletion",
}


def selection_tables(scores: dict[str, Any]) -> tuple[Table, Table]:
    """Return tables of the result of `selection_scores`, with half of each 95% interval.

    The first is by stage, in percent, with chance in brackets; the second is of the whole image.
    """
    table = Table(
        title=f"{scores['strategy']}\n{scores['num_images']} images, {scores['num_patches']} "
        "patches (chance in brackets)"
    )
    table.add_column("block")
    table.add_column("keep", justify="right")
    for column in STAGE_COLUMNS.values():
        table.add_column(column, justify="right")
    for stage in scores["stages"]:
        cells = (_interval(stage[key], 100, 1, stage.get(f"{key}_chance")) for key in STAGE_COLUMNS)
        table.add_row(str(stage["block"]), str(stage["keep"]), *cells)
    whole = Table(show_header=False)
    for key, name in WHOLE_ROWS.items():
        whole.add_row(name, _interval(scores[key], 1, 4))
    return table, whole


def _interval(
    found: dict[str, Any] | None, scale: int, digits: int, chance: dict[str, Any] | None = None
) -> str:
    if found is None:
        return "-"
    text = f"{scale * found['mean']:.{digits}f}"
    if found["high"] is not None:
        text += f" ± {scale * (found['high'] - found['mean']):.{digits}f}"
    return text if chance is None else f"{text} ({scale * chance['mean']:.{digits}f})"
