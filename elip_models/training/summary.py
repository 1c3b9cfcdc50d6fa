"""What `elip train` prints and writes after a run."""

from pathlib import Path

from elip_models.tasks.tables import retrieval_table, task_table, zero_shot_table
from elip_models.training.errors import as_write_error
from elip_models.training.result import TrainResult
from elip_models.training.run_config import RunConfig
from elip_models.validation import require_extra

with require_extra("elip_models.training"):
    from rich.console import Console
    from rich.markup import escape
    from rich.panel import Panel
    from rich.table import Table


def print_summary(config: RunConfig, result: TrainResult, console: Console) -> None:
    """Write the reports that `config.report` names, then print steps, loss, scores and files."""
    files = [result.output_dir / name for name in ("model", "metrics.jsonl")]
    with as_write_error(result.output_dir):
        files += _write_reports(config, result, console)
    summary = Table.grid(padding=(0, 2))
    summary.add_row("steps", str(result.step))
    summary.add_row("loss", f"{result.loss:.4f}")
    summary.add_row("skipped", escape(result.skipped))
    if result.scores is not None:
        summary.add_row("retrieval", retrieval_table(result.scores))
    if result.zero_shot is not None:
        summary.add_row("zero-shot", zero_shot_table(result.zero_shot))
    if result.task_scores is not None:
        summary.add_row(config.task, task_table(result.task_scores))
    summary.add_row("files", escape("\n".join(map(str, files))))
    console.print(Panel(summary, title=escape(config.name), expand=False))


def _write_reports(config: RunConfig, result: TrainResult, console: Console) -> list[Path]:
    if config.task is not None:
        return _write_task_files(config, result)
    if not {"timing", "picture"} & set(config.report):
        return []
    from elip_models.training.report import Reporter

    reporter = Reporter(result.model, result.tokenizer, result.eval_source, result.output_dir)
    files = [reporter.timing(console)] if "timing" in config.report else []
    return [*files, reporter.picture()] if "picture" in config.report else files


def _write_task_files(config: RunConfig, result: TrainResult) -> list[Path]:
    scores = result.task_scores
    if scores is None:
        return []
    files = [scores.write(result.output_dir / "scores.json")]
    if "picture" in config.report and scores.predictions:
        from elip_models.analysis.predictions import draw_predictions

        path = result.output_dir / "predictions.png"
        shown = result.model, result.tokenizer, result.eval_source, scores
        files.append(draw_predictions(*shown, path))
    return files
