"""YAML of recipes, studies and overrides that is hostile or wrong: one sentence, at once."""

import subprocess
import sys

import pytest

from elip_models.pretraining.training.recipe import load_recipe, recipe_with
from elip_models.pretraining.training.yaml_config import MAX_BYTES, read_mapping
from elip_models.validation import ConfigError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
FILES = {
    "aliases": (BOMB, "expected at most 16384 values, those of aliases repeated"),
    "merged aliases": (BOMB + "b: {<<: {c: *a39}}", "expected at most 16384 values"),
    "alias of itself": ("a: &a [*a]", "expected at most 16384 values"),
    "deep": ("a: " + "[" * 50 + "]" * 50, "expected at most 32 levels"),
    "endless": ("a: " + "[" * 100_000, "expected at most 32 levels"),
    "large": ("a: " + "x" * MAX_BYTES, "expected at most 131072 bytes"),
    "key twice": ("a: 1\nb: {c: 1, c: 2}", "expected each key once, got 'c' twice"),
    "number as key": ("1: a", "expected text as key, got '1'; put it in quotes"),
    "no as key": ("no: a", "expected text as key, got 'no'; put it in quotes"),
    "list as key": ("? [a]\n: b", "expected text as key, got"),
    "int tag": ("seed: !!int foo", "not valid YAML: line 1: expected a value of !!int, got 'foo'"),
    "empty int": ("seed: !!int ''", "expected a value of !!int, got ''"),
    "bool tag": ("seed: !!bool foo", "expected a value of !!bool, got 'foo'"),
    "digits": ("seed: 0x_", "expected a value of !!int, got '0x_'"),
    "bits": (f"seed: 0x{'f' * 5000}", "expected a value of !!int, got '0xfff"),
    "sexagesimal": (f"seed: 1{':59' * 5000}.0", "expected a value of !!float, got '1:59"),
    "timestamp": ("seed: !!timestamp foo", "could not determine a constructor for the tag"),
    "binary": ("seed: !!binary foo", "could not determine a constructor for the tag"),
    "object": ("seed: !!python/object/apply:os.system [a]", "could not determine a constructor"),
    "tab": ("a:\n\t- b", "not valid YAML"),
    "NUL": ("a: \0", "not valid YAML"),
    "two documents": ("a: b\n---\na: c", "expected a single document"),
    "nothing": ("", "expected a mapping of keys, got NoneType"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_sentence(tmp_path, name):
    text, said = FILES[name]
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_mapping(path)
    message = str(error.value)
    assert said in message and "a.yaml: " in message and len(message) < 1000


def test_anchors_and_merged_keys_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: &a {aa: 1, bb: 2}\nd: &d {<<: *a, bb: 3}\ne: {<<: *d, aa: 4}\nf: *d")
    found = read_mapping(path)
    assert found["d"] == found["f"] == {"aa": 1, "bb": 3} and found["e"] == {"aa": 4, "bb": 3}


OVERRIDES = {
    "date": ("seed=2024-99-99", "seed: expected an integer in [0, 4294967295], got '2024-99-99'"),
    "day": ("seed=2024-01-01", "seed: expected an integer in [0, 4294967295], got '2024-01-01'"),
    "digits": ("seed=0x_", "seed: expected an integer in [0, 4294967295], got '0x_'"),
    "tag": ("seed=!!int foo", "seed: expected an integer in [0, 4294967295], got '!!int foo'"),
    "huge": (
        f"optim.lr={'9' * 400}",
        "optim.lr: expected a number above 0, got an integer of",
    ),
    "infinite": ("optim.lr=1e400", "optim.lr: expected a number above 0, got '1e400'"),
    "long": (f"seed={'x' * 10**6}", "seed: expected an integer in [0, 4294967295], got 'xxx"),
    "long key": (f"{'x' * 10**6}=1", "xxx: no such key"),
    "many sections": (f"model.overrides{'.a' * 5000}=1", "expected at most 16 sections"),
    "bomb": (f"model.overrides={{a: [{'&a [x], *a' + ', *a' * 20000}]}}", "model.overrides: exp"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_override_is_one_sentence(name):
    override, said = OVERRIDES[name]
    with pytest.raises(ConfigError) as error:
        load_recipe("clip_tiny", [override])
    assert said in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["model: 5", "model: [a]", "model: {name: clip, overrides: [a]}"])
def test_a_section_of_another_kind_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(f"name: a\noutput_dir: b\n{text}")
    with pytest.raises(ConfigError, match=r"model.*expected a (section|mapping)"):
        recipe_with(path, {}, {"schedule": "clip"})


def test_a_bomb_takes_neither_memory_nor_time(tmp_path):
    (tmp_path / "a.yaml").write_text(BOMB)
    command = [sys.executable, "-m", "elip_models.cli", "train", "a.yaml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and not run.stdout
