"""Tokenizers of a folder that is not trusted: a file of other content is named."""

import json

import pytest

from elip_models.pretraining.data import load_tokenizer, train_tokenizer

OTHERS = ["[]", "3", "null", '"a"', "", "\0", "[" * 100_000, "\xff"]


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(["a red dog", "two cats"] * 9, 300).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.mark.parametrize("content", OTHERS, ids=lambda text: repr(text[:5]))
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_named(folder, name, content):
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("tokenizer.json", ("model", "vocab"), {"a": "b"}),
        ("tokenizer.json", ("model", "vocab"), 3),
        ("tokenizer.json", ("model", "merges"), None),
        ("tokenizer.json", ("model", "type"), "Other"),
        ("tokenizer.json", ("added_tokens",), "a"),
        ("tokenizer.json", ("version",), {}),
        ("tokenizer_config.json", ("eos_token",), 3),
        ("tokenizer_config.json", ("tokenizer_class",), ["a"]),
        ("tokenizer_config.json", ("model_max_length",), "a"),
    ],
)
def test_values_of_other_kinds_name_the_folder(folder, file, keys, value):
    content = holder = json.loads((folder / file).read_text())
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"name_or_path: expected .*tokenizer"):
        load_tokenizer(folder)
