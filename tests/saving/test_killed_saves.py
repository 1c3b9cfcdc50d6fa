"""A save that is killed leaves the old folder or the new one, and replaces any library's save."""

import pytest

from tests.helpers.tiers import slow_except
from tests.killed_saves import Pair, kill_all, killed_writes, without_exchange

QUICK = [("timm", "open_clip")]
SLOW = [("nothing", "ours"), ("peft", "transformers"), ("LLaVA", "timm")]
SLOW += [("ours, tokenizer", "ours, adapters"), ("ours, adapters", "ours, adapters")]


@pytest.mark.parametrize(("old", "new"), slow_except(QUICK, QUICK + SLOW))
def test_a_save_over_another_loads_as_the_new_one_and_killed_as_one_of_both(old, new, tmp_path):
    pair = Pair(tmp_path, old, new)
    count = pair.operations()
    found = kill_all(pair, [count // 2, count - 3])
    assert found["old"] and found["new"]


def test_where_names_cannot_be_exchanged_a_killed_save_is_recovered(tmp_path):
    with without_exchange():
        pair = Pair(tmp_path, "timm", "open_clip")
        count = pair.operations()
        found = kill_all(pair, (count - 19, count - 18, count - 17))
    assert found["old"] and found["new"]


@pytest.mark.parametrize("name", slow_except(["best.json"], ["best.json", "checkpoint of a run"]))
def test_a_killed_write_leaves_the_old_content_or_the_new_one(name, tmp_path):
    assert killed_writes(tmp_path, name)["old"]
