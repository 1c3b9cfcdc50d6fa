"""A test of training runs as in its own process; models to fine-tune."""

import pytest
import torch

from elip_models.pretraining.data import open_source, train_tokenizer
from elip_models.pretraining.models.registry import create_model, family_of
from tests.helpers.tiny_run import own_process


@pytest.fixture(autouse=True)
def _own_process():
    with own_process():
        yield


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Run the test in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return a function from a family to the folder of a pre-trained tiny model and tokenizer."""
    source, made = open_source("emoji_scenes:size=40", image_size=32), {}

    def folder(family):
        if family not in made:
            captions = (text for i in range(40) for text in source.captions(i))
            tokenizer = train_tokenizer(captions, 300)
            sizes = family_of(f"{family}_tiny").fit_tokenizer(tokenizer, 32)
            torch.manual_seed(0)
            model = create_model(
                f"{family}_tiny", image_size=32, vision_depth=2, schedule="1(100%) 1(50%)", **sizes
            )
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family], tokenizer=tokenizer)
        return made[family]

    return folder
