"""`elip models` lists what can be reduced; with a filter it gives the answer of `reduce_`."""

import pytest
import timm

import elip_models
from elip_models.commands.models import FAMILIES
from tests.helpers.tiny_run import elip


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def test_without_a_filter_every_family_has_a_row(capsys):
    assert elip("models") == 0
    printed = capsys.readouterr().out
    assert all(each in printed for each in elip_models.list_models())
    for library, _, example in FAMILIES:
        assert library in printed and example in printed


@pytest.mark.parametrize(
    ("pattern", "row", "reason"),
    [
        ("vit_tiny_patch16_224", ["merge", "", "", ""], ""),
        ("deit_tiny_distilled*", ["merge", "", "", ""], ""),
        (
            "beit_base_patch16_224",
            ["merge", "resize_merge, resize", "", "1"],
            "1. the bias of its attention is that of one image size",
        ),
        ("cait_xxs24_224", ["none", "all", "", "1"], "1. it mixes its attention heads"),
    ],
)
def test_a_filter_gives_strategies_and_reasons(pattern, row, reason, capsys):
    assert elip("models", pattern) == 0
    printed = capsys.readouterr().out
    (name,) = timm.list_models(pattern)
    (line,) = (line for line in printed.splitlines() if f" {name} " in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[1 : len(row) + 1] == row
    assert reason in printed


def test_an_unknown_name_gets_a_suggestion(capsys):
    assert elip("models", "vit_tny_patch16_224") == 2
    assert "FILTER: expected a name of timm" in (error := capsys.readouterr().err)
    assert "did you mean 'vit_tiny_patch16_224'?" in error
