"""A model to fine-tune is compared with its weight file before a model of its sizes exists."""

import json
import shutil

import pytest

from elip_models.pretraining.models.registry import create_model
from elip_models.pretraining.training.finetune import finetune_recipe
from elip_models.validation import ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a small model that can be fine-tuned."""
    folder = tmp_path_factory.mktemp("saved")
    sizes = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
    create_model("albef_tiny", **sizes).save_pretrained(folder)
    assert finetune_recipe("vqa_tiny", folder, {}).model
    return folder


@pytest.mark.parametrize("name", ["vision_width", "vocab_size", "embed_dim", "vision_depth"])
def test_a_size_that_the_weights_do_not_have_is_refused(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "changed")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {name: 1024 if name == "vision_depth" else 2**20}))
    with pytest.raises(ConfigError, match=r"^--from: expected weights that fit .*config\.json"):
        finetune_recipe("vqa_tiny", folder, {})
