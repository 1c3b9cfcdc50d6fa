"""The results of a calibration: their JSON, their sentence, and the report as HTML and Markdown."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from elip_models.calibration import chart, report
from elip_models.calibration.report import html, markdown
from elip_models.calibration.results import BEST, JSON, Results, Setting, Worst
from elip_models.intervals import Interval
from elip_models.strategies.serialization import read_strategy, settings_of
from elip_models.strategies.spec import get_strategy

ATTACK = '<script>alert("|`x`")</script>.jpg'
VOID = {"meta", "br", "img"}


def setting(name, cost, loss, width=0.01, *, role="tried", timed=True, held_back=None):
    """A setting with these losses on both parts."""

    def gaps(loss):
        gap = Interval(-loss, -loss - width, -loss + width)
        return {"top-1": gap, "top-5": Interval(*(np.array(gap) / 2).tolist())}

    return Setting(
        name,
        settings_of(get_strategy("merge:r=8")),
        flops=cost - 0.05,
        kept=cost - 0.1,
        time={"1": cost + 0.1, "8": Interval(cost, cost - 0.01, cost + 0.02)} if timed else {},
        memory=None,
        differences=gaps(loss),
        role=role,
        held_back=None if held_back is None else gaps(held_back),
    )


def made(role="chosen", held_back=0.004, confirmed=True, needed=None):
    """Results with each role; `role` is that of the fastest setting within the tolerance."""
    chosen = setting("merge 0.7", 0.69, 0.002, 0.007, role=role, held_back=held_back)
    return Results(
        task="probe",
        measures=("top-1", "top-5"),
        tolerance=0.015,
        model="timm:vit_base",
        counts={"chosen_on": 500, "held_back": 500},
        dense={"top-1": Interval(0.824, 0.79, 0.855), "top-5": Interval(0.95, 0.93, 0.97)},
        settings=(
            setting("merge 0.8", 0.8, 0.001),
            chosen,
            setting("tome 0.6", 0.61, 0.03, timed=False),
            setting("resize 0.7", 0.7, 0.03, role="control", held_back=0.031),
            setting("evit 0.7", 0.71, 0.02, role="compared", held_back=0.018),
            setting("merge 0.6, distilled", 0.6, 0.02, role="distilled", held_back=0.008),
        ),
        chosen=chosen if role == "chosen" else None,
        nearest=chosen,
        confirmed=confirmed,
        needed=needed,
        refused={"guided": "it needs a text & an image"},
        machine={"device": "cpu", "threads": 2, "batch_size": 8, "torch": "2.13"},
        worst=(
            Worst(ATTACK, "tabby", "<b>tiger</b>", "tabby", b"\x89PNG"),
            Worst("folder_a/*.png", "", "", "", b""),
        ),
    )


def without_times(results):
    settings = tuple(each._replace(time={}) for each in results.settings)
    (chosen,) = (each for each in settings if each.role == "chosen")
    return replace(results, settings=settings, chosen=chosen, nearest=chosen)


def slow():
    """Results whose choice is confirmed, and as slow as the dense model."""
    chosen = setting("merge 0.9", 0.99, 0.0, role="chosen", held_back=0.0)
    return replace(made(), settings=(chosen,), chosen=chosen, nearest=chosen)


UNCONFIRMED = {"held_back": 0.012, "confirmed": False, "needed": 2400}
ALL = {
    "confirmed": made(),
    "unconfirmed": made(**UNCONFIRMED),
    "none": made(role="tried", confirmed=False),
    "refused": replace(made(confirmed=False), settings=(), chosen=None, nearest=None, worst=()),
    "not timed": without_times(made()),
    "no gain": slow(),
}


@pytest.mark.parametrize("results", ALL.values(), ids=ALL)
def test_results_are_equal_after_a_round_trip_by_json(results, tmp_path):
    results.save(tmp_path)
    assert Results.read(tmp_path / JSON) == results
    assert (tmp_path / BEST).exists() is results.usable


def test_a_usable_choice_is_a_file_for_reduce_and_another_one_removes_it(tmp_path):
    made().save(tmp_path)
    assert read_strategy(str(tmp_path / BEST)) == get_strategy("merge:r=8")
    for results in (made(**UNCONFIRMED), slow()):
        made().save(tmp_path)
        results.save(tmp_path)
        assert not (tmp_path / BEST).exists()


def test_a_file_that_has_no_results_is_an_error(tmp_path):
    for content, message in (
        ('{"version": 1}', "expected results of a calibration"),
        ('{"version": 2}', "`version` must be 1, got 2"),
    ):
        (tmp_path / JSON).write_text(content)
        with pytest.raises(ValueError, match=message):
            Results.read(tmp_path / JSON)


def test_the_sentence_has_time_change_interval_and_images():
    assert made().sentence() == (
        "`merge 0.7` takes 0.69 of the time at batch 8 and changes top-1 by -0.4 points "
        "(-1.1 to 0.3) on 500 images held back."
    )
    assert "changes top-1 by +0.3 points (-0.4 to 1.0)" in made(held_back=-0.003).sentence()


def test_a_choice_that_is_not_confirmed_names_the_images_needed():
    results = made(**UNCONFIRMED)
    assert results.sentence().endswith(
        "This does not confirm a loss of less than 1.5 points. About 2,400 images in all would "
        "show it, instead of 1,000."
    )
    assert "More images would not show it" in replace(results, needed=None).sentence()


def test_a_faster_setting_that_failed_is_named():
    failed = setting("merge 0.5", 0.5, 0.01, held_back=0.02)
    results = replace(made(), settings=(*made().settings, failed))
    text = "Not confirmed: `merge 0.5` at 0.50 of the time at batch 8 changes top-1 by -2.0"
    assert text in markdown(results)


def test_no_choice_names_the_nearest_setting():
    assert (
        "The nearest is `merge 0.7`, which changes top-1 by -0.2 points" in ALL["none"].sentence()
    )
    assert ALL["refused"].sentence() == "No strategy can reduce this model."


def test_a_choice_that_was_not_timed_goes_by_its_flops():
    assert ALL["not timed"].usable


def test_a_choice_that_saves_no_time_is_not_recommended():
    assert slow().confirmed and not slow().usable
    prefix = "No setting within 1.5 points saves time on this machine. `merge 0.9` takes 0.99 of"
    assert slow().sentence().startswith(prefix)
    assert "Use the dense model, larger batches" in markdown(slow())
    assert "You can use this setting" not in markdown(slow())


def test_the_first_step_of_the_largest_batch_decides():
    keys = ["1 prefill", "1 token", "16 prefill", "16 token", "8 prefill"]
    chosen = made().chosen._replace(time=dict.fromkeys(keys, 0.5))
    results = replace(made(), settings=(chosen,), chosen=chosen, nearest=chosen)
    assert results.cost_key == "16 prefill"
    assert "takes 0.50 of the prefill time at batch 16 and" in results.sentence()


def test_the_table_begins_with_what_was_measured_on_the_images_held_back():
    names = [line.split("  ")[0] for line in made().table().splitlines()]
    held_back = ["evit 0.7", "resize 0.7", "merge 0.7", "merge 0.6, distilled"]
    assert names[1:-1] == ["dense", *held_back, "merge 0.8", "tome 0.6"]
    assert names[-1].startswith("guided: it needs a text")


class Page(HTMLParser):
    """The text of a page, its tags, and whether each tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "


@pytest.mark.parametrize("results", ALL.values(), ids=ALL)
def test_a_report_has_the_sentence_and_each_setting_in_html_that_is_closed(results):
    page, text = Page(html(results)), markdown(results)
    plain = re.sub(r"\s+", " ", page.text).replace(" ,", ",")
    assert results.sentence().replace("`", "").strip() in plain
    assert results.sentence() in text
    for each in results.settings:
        assert each.name in page.text and each.name in text
    assert "nan" not in text.lower().replace("finance", "")


@pytest.mark.parametrize("results", ALL.values(), ids=ALL)
def test_a_report_loads_nothing_from_elsewhere(results):
    page = html(results)
    assert "http" not in page and "//" not in page and "@import" not in page
    tags = Page(page).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [attributes["src"] for _, attributes in tags if "src" in attributes]
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_names_are_escaped():
    page, text = html(made()), markdown(made())
    assert "<script" not in page and "<b>" not in page
    assert ATTACK in Page(page).text and "<b>tiger</b>" in Page(page).text
    assert "<script" not in re.sub(r"\\<", "", text) and r"\<b\>tiger" in text


def test_the_chart_has_each_cost_and_says_what_it_leaves_out():
    page = Page(html(made()))
    marks = [attributes["class"] for tag, attributes in page.tags if tag == "g"]
    for role in ("dense", "tried", "chosen", "control", "compared", "distilled"):
        assert f"mark {role}" in marks
    assert "not within the tolerance (1)" in page.text


def test_without_a_choice_the_chart_has_all_settings_against_their_flops():
    page = Page(html(ALL["none"]))
    assert "Change against FLOPs" in page.text and "Not in the chart" not in page.text


def test_losses_far_beyond_the_tolerance_are_drawn_at_the_edge():
    results = made()
    far = setting("tome 0.3", 0.5, 0.4)
    page = Page(html(replace(results, settings=(*results.settings, far))))
    assert "Triangles at the lower edge: 1 with a larger loss" in page.text
    assert "Triangles" not in html(results)


def test_every_number_of_a_report_has_the_sign_of_a_change():
    results = made()
    text = markdown(results)
    assert "The lower end of the interval, -1.1 points, is above the limit, -1.5 points." in text
    assert "The control `resize 0.7` at 0.70 of the time at batch 8 changes top-1 by -3.1" in text
    drawn = chart.change_against_cost(results)
    below = {mark.title: mark.y > drawn.tolerance for mark in drawn.marks if mark.title != "dense"}
    assert below["resize 0.7: -3.1 points at 0.70"] and not below["merge 0.7: -0.4 points at 0.69"]


def test_small_losses_keep_a_digit():
    assert [report.number(loss) for loss in (0.0123, 0.0004, -0.00001)] == ["1.2", "0.04", "0.0"]
