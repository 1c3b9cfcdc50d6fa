"""The examples run without a network, and print what they promise."""

import os
import re
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import timm
from PIL import Image
from timm.models import save_for_hf

from benchmarks.random_models import llava, save_model
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


NOTEBOOKS = ("first_steps", "calibrate", "vision_language")


def read_notebook(name):
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def outputs_of(name, **parameters):
    """Run a notebook, its cell `parameters` followed by these; return its text and its outputs."""
    book = read_notebook(name)
    if parameters:
        (cell,) = (each for each in book.cells if "parameters" in each.metadata.get("tags", ()))
        cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    done = nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    outputs = [each for cell in done.cells for each in cell.get("outputs", [])]
    return "".join(each["text"] for each in outputs if each.get("name") == "stdout"), [
        each["data"] for each in outputs if "data" in each
    ]


@pytest.fixture
def one_thread(monkeypatch, tmp_path):
    """Run the kernel of a notebook in an own folder, with the command `elip` and one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)


def test_every_notebook_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_stores_no_output(name):
    cells = read_notebook(name).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_links_of_a_notebook_exist(name):
    text = "".join(cell.source for cell in read_notebook(name).cells)
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (EXAMPLES / link).exists(), link


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_first_steps_draw_what_was_merged():
    text, shown = outputs_of("first_steps")
    counts = r"tokens per layer +197 181 \.\. 17, 9 after the last\n.*logits \(4, 1000\)"
    assert re.search(counts, text, re.DOTALL)
    assert re.search(r"dense \S+ s, reduced \S+ s: ratio \d+\.\d\d$", text.strip())
    assert sum("image/png" in data for data in shown) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_notebook_of_calibrate_shows_table_and_report(tmp_path):
    model = timm.create_model("test_vit", img_size=64)
    save_for_hf(model, tmp_path / "vit", model_args={"img_size": 64})
    for name, hue in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(-40, 40, (64, 64, 3))
            image = Image.fromarray(np.uint8(noise + hue))
            image.save(tmp_path / "photographs" / name / f"{i}.png")
    text, shown = outputs_of(
        "calibrate", MODEL=f"timm:local-dir:{tmp_path / 'vit'}", TOLERANCE=1.0, MINUTES=0
    )
    assert re.search(r"^setting +role +FLOPs .*change of top-1.*\ndense +1.00 ", text, re.MULTILINE)
    assert "on 12 images held back" in text
    assert "tokens per layer" in text or "No setting was confirmed" in text  # by the times
    (report,) = (data["text/html"] for data in shown if "text/html" in data)
    assert "iframe" in report and "&lt;svg" in report


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_notebook_of_a_language_model_counts_tokens_and_answers(tmp_path):
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = text | {"projection_dim": 32}
    text |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
    save_model(*llava(text, vision, pixels=112), tmp_path / "llava")
    printed, shown = outputs_of("vision_language", MODEL=str(tmp_path / "llava"), NEW_TOKENS=3)
    (prompt,) = re.findall(r"^(\d+) tokens in the prompt$", printed, re.MULTILINE)
    kept = re.findall(r"^keep=\S+: (\d+) tokens, \d\.\d+ s, \d+\.\d\d of the time$", printed, re.M)
    assert [int(prompt) - int(count) for count in kept] == [32, 48]  # of 64 image tokens
    assert sum("image/png" in data for data in shown) == 1
