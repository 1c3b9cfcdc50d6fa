"""README and docs: their Python runs, their commands are the command line's, their counts hold."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
import typer

import elip_kernels
import elip_models
from elip_models.cli import app
from elip_models.models import registry
from tests.helpers.tiers import tiered

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if page.name != "data.md"]  # tests/data/test_mixture.py runs that one
SEEN_AS = {"README.md": "meta", "index.md": "meta", "models.md": "meta"}
"""Where the models of a page are made that takes ViT-B: without memory and time."""


def blocks(page, language):
    """The code of a page in that language, block by block."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def stand_ins(page):
    """What a page's code takes as given."""
    is_training = page.name == "training.md"
    size, length = (64, 32) if is_training else (224, 77)
    ids = torch.randint(3, 900, (2, length))
    ids[:, 0], ids[:, -1] = 1, 2
    batch = (torch.randn(2, 3, size, size), ids, torch.ones_like(ids))
    return {
        "elip_models": elip_models,
        "images": batch[0],
        "input_ids": ids,
        "texts": ids,
        "attention_mask": batch[2],
        "text_cls": torch.randn(2, 192),
        "loader": [batch],
        "range": lambda stop: range(min(stop, 3)),
    }


@pytest.fixture
def small(monkeypatch):
    """timm's models without weights, as nothing may be fetched; ours by name the tiny ones."""
    of_timm, ours = timm.create_model, registry.create_model

    def without_weights(name, pretrained=False, **options):
        return of_timm(name, **options)

    def tiny(name, **options):
        return ours(f"elip_{name.split('_')[1]}_tiny", **options)

    monkeypatch.setattr(timm, "create_model", without_weights)
    monkeypatch.setattr(registry, "create_model", tiny)


PYTHON = [page for page in RUN if blocks(page, "python")]


@pytest.mark.parametrize(
    "page",
    tiered(PYTHON, [page for page in PYTHON if page.name != "models.md"]),
    ids=lambda p: p.name,
)
def test_the_python_of_a_page_runs(page, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = stand_ins(page)
    for code in blocks(page, "python"):
        on_cpu = any(word in code for word in ("import elip_kernels", "open_clip", "save_reduced"))
        device = "cpu" if on_cpu else SEEN_AS.get(page.name, "cpu")
        if device == "cpu" and page.name in ("models.md", "strategies.md"):
            names["model"] = timm.create_model("vit_tiny_patch16_224")
        with torch.device(device):
            exec(compile(code, page.name, "exec"), names)
    assert names


COMMAND = re.compile(r"^(?:elip|.*&& elip|torchrun .* -m elip_models\.cli) (.*)$", re.MULTILINE)


def test_the_commands_of_all_pages_are_those_of_the_command_line():
    shell = "".join(code for page in PAGES for code in blocks(page, "bash"))
    found = COMMAND.findall(shell.replace("\\\n", " "))
    assert len(found) > 10
    for line in found:
        command, words = typer.main.get_command(app), shlex.split(line, comments=True)
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        command.make_context("elip", words)  # raises where there is no such command or option


def test_the_scaling_table_is_what_is_counted():
    text = (ROOT / "docs" / "scaling.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for name, cells in rows:
        with torch.device("meta"):
            model = timm.create_model(name)
        last, exact = (
            elip_models.reduction_summary(elip_models.reduce_(model, scorer=scorer))
            for scorer in ("last", "exact")
        )
        tome = elip_models.reduction_summary(
            elip_models.reduce_(model, strategy="tome", keep=last.keep)
        )
        shares = [each for x in (last, exact) for each in (x.training_flops, x.forward_flops)]
        sizes = [str(last.dense_tokens), str(len(last.tokens))]
        assert cells.split(" | ") == [*sizes, *(f"{x:.2f}" for x in (*shares, tome.training_flops))]


def test_the_readme_takes_three_minutes_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.split("\n")) <= 150
    links = re.findall(r"\]\((docs/[^)#]+)", text)
    assert len(links) > 10
    assert all((ROOT / link).is_file() for link in links)


def test_the_reference_has_every_public_name_of_the_kernels():
    page = (ROOT / "docs/api/kernels.md").read_text()
    named = {line.rpartition(".")[2] for line in re.findall(r"^::: (.*)$", page, re.MULTILINE)}
    assert named == set(elip_kernels.__all__) - {"__version__"}
