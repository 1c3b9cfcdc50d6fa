"""docs/paper.md: tiny commands run, in order, and print the row of their table."""

import re
import shlex
from pathlib import Path

import pytest

from elip_models.pretraining.training.recipe import recipe_settings
from tests.helpers.programs import exit_status

PAGE = Path(__file__).parents[2] / "docs" / "paper.md"
ITEMS = [*(f"Table {number}" for number in range(1, 11)), *(f"Figure {i}" for i in range(1, 5))]


PRINTED = [r"vqa: 12 examples.*accuracy"] * 2 + [r"nlvr2: 12 examples.*accuracy"] * 2
"""What the commands of Table 2 print, in order."""
SMALL = (
    "optim.steps=2",
    "optim.batch_size=8",
    "optim.warmup_steps=0",
    "log_every=1",
    "trackers=[]",
)


def section(title):
    """Return the text of a section of the page."""
    text = PAGE.read_text(encoding="utf-8")
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


def tiny_commands(title):
    """Return the words of the commands below `# tiny` in the block of a section."""
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section(title), re.DOTALL | re.MULTILINE)
    full, tiny = re.split(r"^# tiny.*\n", block, flags=re.MULTILINE)
    assert full
    lines = tiny.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def shortened(words):
    """Return a command with few steps and samples, and otherwise the same."""
    words = [re.sub(r"size=\d+", "size=12", word) for word in words]
    if words[:2] not in (["elip", "train"], ["elip", "finetune"]):
        return words
    is_training = words[1] == "train"
    name = words[2] if is_training else f"finetune/{words[2]}"
    data = {each.key: each.value for each in recipe_settings(name)}
    sizes = {"data.train": 64, "data.eval": 12}
    overrides = [
        f"{key}=" + re.sub(r"size=\d+", f"size={n}", data[key]) for key, n in sizes.items()
    ]
    if is_training:
        overrides += ["eval_every=0", "report=[]", "data.vocab_size=300"]
    return [*words, *SMALL, *overrides]


def test_every_table_and_figure_has_a_row_and_a_section_with_commands():
    table = PAGE.read_text(encoding="utf-8").partition("## Data")[0]
    for item in ITEMS:
        anchor = item.lower().replace(" ", "-")
        row = re.search(rf"^\| \[{item}\]\(#{anchor}\) \| (.*) \|$", table, re.MULTILINE)
        assert row, item
        assert len(row[1].split(" | ")) in (2, 3), item
        assert tiny_commands(item), item


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with the tiny models of the section `Pre-train`."""
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in tiny_commands("Pre-train"):
            assert exit_status(*shortened(words)) == 0
    return folder


@pytest.mark.slow
def test_the_tiny_commands_print_the_row_of_their_table(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "200")
    for words, pattern in zip(tiny_commands("Table 2"), PRINTED, strict=True):
        capsys.readouterr()
        assert exit_status(*shortened(words)) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert re.search(pattern, printed, re.DOTALL), (words, printed)
