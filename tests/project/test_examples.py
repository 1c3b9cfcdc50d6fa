"""The examples run without a network, and print what they promise."""

import re
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.helpers.tiny_run import own_process

EXAMPLES = Path(__file__).parents[2] / "examples"
PRINTED = {
    "timm_finetuning": r"tokens per layer .*epoch 1: (?P<right>\d+)% of the colours right",
    "hf_trainer": r"tokens by step: \[(33, ){16}65, 65, 65, 65\].*\s(?P<right>\d+)% of the colours",
    "open_clip_zero_shot": r"tokens per layer .*blue: \w+ \(\d+%\), cosine to dense [01]\.\d+$",
    "dense_grid": r"step 23: 41 of 65 tokens, intersection over union 0\.(?P<right>\d+)$",
    "own_strategy": r"100 of 197 tokens; kept: \[.*longest\(keep_ratio=.*logits \(2, 1000\)$",
    "video": r"393 344 .*FLOPs .* leave the last block, of up to \d+ patches\stime .*dense one's$",
    "audio": r"602 526 .*FLOPs .* leave the last block, of up to \d+ patches\stime .*dense one's$",
}
"""What the whole output is, and a percentage in it that must be better than chance."""


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_says_what_to_install(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert 'pip install -e ".[' in text.split('"""')[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_promises(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    with own_process():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out.strip()
    found = re.search(PRINTED[name], printed, re.DOTALL)
    assert found, printed
    assert int(found.groupdict().get("right", 100)) > 60


def test_the_notebook_stores_no_output():
    book = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)


@pytest.mark.slow
def test_the_notebook_runs_and_draws_what_was_merged(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    done = nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    outputs = [each for cell in done.cells for each in cell.get("outputs", [])]
    text = "".join(each["text"] for each in outputs if each.get("name") == "stdout")
    counts = r"tokens per layer +197 181 \.\. 17, 9 after the last\n.*logits \(4, 1000\)"
    assert re.search(counts, text, re.DOTALL)
    assert re.search(r"dense \S+ s, reduced \S+ s: ratio \d+\.\d\d$", text.strip())
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 1
