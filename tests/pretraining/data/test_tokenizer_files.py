"""Tokenizers of a folder with a damaged file: the folder is named."""

import json

import pytest

from elip_models.pretraining.data import load_tokenizer, train_tokenizer


@pytest.mark.parametrize("content", ["[]", "3", "", "[" * 100_000, "\xff"], ids=lambda t: t[:5])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_names_the_folder(tmp_path, name, content):
    train_tokenizer(["a red dog", "two cats"] * 9, 300).save_pretrained(tmp_path)
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"name_or_path: expected a folder .*{tmp_path.name}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("tokenizer.json", "added_tokens", "a"), ("tokenizer_config.json", "eos_token", 3)],
)
def test_values_of_other_kinds_name_the_folder(tmp_path, file, key, value):
    train_tokenizer(["a red dog", "two cats"] * 9, 300).save_pretrained(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=r"name_or_path: expected .*tokenizer"):
        load_tokenizer(tmp_path)
