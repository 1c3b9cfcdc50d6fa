"""Captioning on the files of NoCaps: scores of each domain, and captions for the test server."""

import json

import pytest
from PIL import Image

from elip_models.pretraining.data import DataError, open_source, train_tokenizer
from elip_models.pretraining.models.blip.tasks import BLIPCaptioning
from elip_models.pretraining.tasks import caption_metrics
from elip_models.pretraining.tasks.caption_metrics import caption_scores
from elip_models.pretraining.tasks.captioning import Captioning
from elip_models.pretraining.tasks.registry import get_task
from elip_models.validation import ConfigError
from tests.helpers.cross_modal_cases import SIZES
from tests.helpers.task_cases import LOADING, SIZE, Stub, Tokens
from tests.helpers.tiny_run import elip

DOMAINS = ("in-domain", "near-domain", "out-domain", "near-domain", "near-domain")
CAPTIONS = (
    ("a red dog on the grass", "the dog lies on green grass"),
    ("two cats sleep in a box", "cats in a brown box"),
    ("a fox jumps over a log", "the red fox jumps"),
    ("a bus stands in the street", "one bus in a wide street"),
    ("an owl sits on a branch", "the owl is on a tree branch"),
)
WRITTEN = (
    "a red dog on the grass",
    "two cats in a brown box",
    "a bird jumps over a log",
    "a bus in the street",
    "a cat sits on a branch",
)


@pytest.fixture(autouse=True)
def _without_java(monkeypatch):
    """Use the plain tokenizer, since a start of Java takes half a second."""
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)


def write_files(folder, *, known=range(5)):
    """A file in NoCaps' format, with the captions of the images `known`, or of none."""
    images, annotations = [], []
    for number, domain in enumerate(DOMAINS):
        name = f"{number:016x}.png"
        Image.new("RGB", (6, 5), (40 * number, 0, 0)).save(folder / name)
        images.append({"id": number, "file_name": name, "domain": domain, "open_images_id": "0"})
        texts = CAPTIONS[number] if number in known else ()
        annotations += [{"id": 0, "image_id": number, "caption": text} for text in texts]
    content = {"info": {}, "licenses": [], "images": images}
    content |= {"annotations": annotations} if known else {}
    (folder / "nocaps.json").write_text(json.dumps(content))
    return str(folder / "nocaps.json")


def evaluated(path, monkeypatch, **options):
    written = iter(WRITTEN)

    def write(self, model, tokenizer, images):
        return [next(written) for _ in images]

    monkeypatch.setattr(Captioning, "write", write)
    task = Captioning(**options)
    return task.evaluate(Stub(), Tokens(), task.open(path, image_size=SIZE), LOADING)


def test_each_domain_has_scores_with_the_word_weights_of_all_images(tmp_path, monkeypatch):
    found = evaluated(write_files(tmp_path), monkeypatch)
    plain = caption_scores(WRITTEN, CAPTIONS)
    assert found.scores["cider"] == plain.scores["cider"]
    means = {name: each.mean for name, each in found.scores.items()}
    assert means["near-domain_cider"] == pytest.approx(sum(plain.each[i] for i in (1, 3, 4)) / 3)
    counts = {name: DOMAINS.count(name) for name in DOMAINS}
    weighted = sum(count * means[f"{name}_cider"] for name, count in counts.items()) / 5
    assert means["cider"] == pytest.approx(weighted)
    near = caption_scores([WRITTEN[i] for i in (1, 3, 4)], [CAPTIONS[i] for i in (1, 3, 4)])
    assert found.scores["near-domain_bleu_4"] == near.scores["bleu_4"]
    assert found.baselines["another image's"].keys() == found.scores.keys()
    assert len(found.scores) == 2 * (1 + len(counts))


def test_data_without_domains_has_no_further_scores(monkeypatch):
    found = evaluated("emoji_scenes:size=4", monkeypatch)
    assert found.scores.keys() == {"cider", "bleu_4"}
    with pytest.raises(ValueError, match="domains: expected one for each of the 5 images, got 1"):
        caption_scores(WRITTEN, CAPTIONS, domains=["in-domain"])


@pytest.mark.parametrize("known", [(), (0, 2)])
def test_captions_of_images_without_captions_are_written_for_the_server(
    known, tmp_path, monkeypatch
):
    output = tmp_path / "submission.json"
    path = write_files(tmp_path, known=known)
    found = evaluated(path, monkeypatch, submission=str(output))
    submitted = json.loads(output.read_text())
    expected = [{"image_id": i, "caption": text} for i, text in enumerate(WRITTEN)]
    assert submitted == expected
    assert found.num_examples == len(known) and found.num_skipped == 0
    assert [each.score is not None for each in found.predictions] == [i in known for i in range(5)]
    domains = {"in-domain_cider", "out-domain_cider"} if known else set()
    assert {name for name in found.scores if name.endswith("domain_cider")} == domains


def test_without_a_submission_images_need_captions(tmp_path, monkeypatch):
    path = write_files(tmp_path, known=())
    with pytest.raises(DataError, match=r"no caption"):
        evaluated(path, monkeypatch)
    assert open_source(path, image_size=8, needs_captions=False)[0].captions == ()
    with pytest.raises(ConfigError, match="submission: expected a file in a folder that exists"):
        get_task("captioning", submission="no/such/file").open(path, image_size=8)


def test_the_command_writes_scores_and_captions(tmp_path):
    tokenizer = train_tokenizer(["a dog and a cat", "a picture of"] * 9, 300)
    sizes = SIZES | BLIPCaptioning.fit_tokenizer(tokenizer, 8) | {"max_positions": 24}
    model = BLIPCaptioning(BLIPCaptioning.config_class(**sizes))
    model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    output, submission = tmp_path / "scores.json", tmp_path / "submission.json"
    settings = ("max_length=16", "repetition_penalty=1.1", f"submission={submission}")
    options = [part for each in settings for part in ("--set", each)]
    command = ["eval", "captioning", "--model", tmp_path / "model", "--output", output, *options]
    assert elip(*command, "--data", write_files(tmp_path)) == 0
    assert "out-domain_cider" in json.loads(output.read_text())["scores"]
    assert [each["image_id"] for each in json.loads(submission.read_text())] == [0, 1, 2, 3, 4]
    assert elip(*command, "--data", write_files(tmp_path, known=())) == 0
    assert json.loads(output.read_text())["scores"] == {}
