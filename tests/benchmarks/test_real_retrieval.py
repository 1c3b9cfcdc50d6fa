"""`benchmarks.real.text_tower` and `benchmarks.real.retrieval`: training, ranking, re-ranking."""

import json

import pytest
import torch
import torch.nn.functional as F

import elip_models
from benchmarks.real import __main__ as bench
from benchmarks.real import retrieval, text_tower
from benchmarks.real.evaluation import dense_setting, read_settings
from benchmarks.real.measures import retrieved
from benchmarks.real.photographs import batches, photograph_paths
from elip_models.intervals import bootstrap_interval

PLACES = ("a roof", "a lake", "the sky", "red leaves", "a petal", "green grass")
PLAIN, AGAIN, GUIDED = "tome 0.5", "tome 0.6", "guided_tome:fusion=0,guidance_norm=match 0.5"

UNGUIDED = "guided_tome:fusion=1 0.5"


@pytest.fixture(scope="module")
def captions(folder, tmp_path_factory):
    """Two captions of each photograph, and one of a photograph that is not there."""
    lines = ["absent.png#0\tnothing"]
    for path in photograph_paths(folder):
        thing = "a pagoda" if path.stem[0] == "a" else "a flower"
        place = PLACES[int(path.stem[1])]
        lines += [f"{path.name}#0\t{thing} by {place} .", f"{path.name}#1\t{place} and {thing} ."]
    file = tmp_path_factory.mktemp("captions") / "captions.txt"
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(autouse=True, scope="module")
def small_model(model):
    with pytest.MonkeyPatch.context() as patch:
        for module in (text_tower, retrieval, bench):
            patch.setattr(module, "MODELS", {"timm": lambda: model})
        yield


@pytest.fixture(scope="module")
def tower_file(folder, captions, tmp_path_factory):
    """The file of a tower that was trained on the photographs, with all of them as dev split."""
    made = tmp_path_factory.mktemp("tower")
    names = made / "names.txt"
    names.write_text("\n".join(path.name for path in photograph_paths(folder)))
    arguments = [folder, "--captions", captions, "--train", names, "--dev", names]
    arguments += ["--output", made / "tower.safetensors", "--features", made]
    assert text_tower.main([*map(str, arguments), "--epochs", "40"]) == 0
    return made / "tower.safetensors"


@pytest.fixture
def results(folder, captions, tower_file, tmp_path):
    """Return a function that runs the retrieval command, and returns its JSON."""

    def run(*arguments):
        output = tmp_path / "results.json"
        given = [folder, "--tower", tower_file, "--captions", captions, "--output", output]
        assert retrieval.main([*map(str, given), *map(str, arguments)]) == 0
        return json.loads(output.read_text())

    return run


def texts_of(tower_file, folder, captions):
    tower = text_tower.TextTower.load(tower_file)
    found = text_tower.read_captions(captions, photograph_paths(folder))
    return tower, text_tower.encode_captions(tower, found)


def dense_cls(model, folder, stored=None):
    setting, paths = dense_setting(model), photograph_paths(folder)
    return text_tower.cls_features(model, setting, paths, stored, lambda _: None)


def test_retrieval_is_counted_against_a_plain_form():
    torch.manual_seed(0)
    images = F.normalize(torch.randn(20, 4), dim=1)
    texts = [F.normalize(images[i] + torch.randn(1 + i % 3, 4), dim=1) for i in range(20)]
    found = retrieved(images, texts)
    owners = [i for i, each in enumerate(texts) for _ in each]
    for k in (1, 5):
        for i, own in enumerate(texts):
            hits = [i in (images @ text).topk(k).indices for text in own]
            assert found[f"text_to_image_r{k}"][i] == pytest.approx(sum(hits) / len(hits))
            nearest = (torch.cat(texts) @ images[i]).topk(k).indices
            assert found[f"image_to_text_r{k}"][i] == any(owners[j] == i for j in nearest)
    assert 0 < found["text_to_image_r1"].mean() < found["text_to_image_r5"].mean() < 1


@pytest.mark.slow
def test_a_trained_tower_finds_its_training_images(folder, captions, tower_file, model):
    tower, texts = texts_of(tower_file, folder, captions)
    cls = dense_cls(model, folder, tower_file.with_name("names.safetensors"))
    assert torch.equal(cls, dense_cls(model, folder))
    assert retrieved(tower.image_features(cls), texts)["text_to_image_r1"].mean() > 0.7
    together = tower(["a pagoda", "red leaves and a flower in the middle of green grass"])
    torch.testing.assert_close(tower(["a pagoda"]), together[:1])
    back = tower.image_features(tower.as_cls(texts[0]))
    torch.testing.assert_close(back, texts[0], atol=1e-4, rtol=0)


def test_stored_features_are_those_of_the_same_photographs(
    folder, captions, tower_file, tmp_path, capsys
):
    names = tmp_path / "names.txt"
    names.write_text("a0.png\nb0.png")
    arguments = [folder, "--captions", captions, "--train", names, "--dev", names]
    arguments += ["--output", tmp_path / "x.safetensors", "--features", tower_file.parent]
    with pytest.raises(SystemExit, match="2"):
        text_tower.main([*map(str, arguments)])
    assert "features: expected those of these photographs" in capsys.readouterr().err


def test_recall_of_reduced_images_is_paired_with_dense(
    folder, captions, tower_file, model, results
):
    document = results("--settings", "tome:r=0, tome 0.4", "--against", "dense, tome 0.4")
    dense, same, reduced = document["settings"]
    assert dense["flops"] == same["flops"] == 1 > reduced["flops"]
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["differences"]["dense"] == dict.fromkeys(same["differences"]["dense"], zero)
    assert list(dense["differences"]) == ["tome 0.4"] and list(reduced["differences"]) == ["dense"]
    tower, texts = texts_of(tower_file, folder, captions)
    (images,) = batches(photograph_paths(folder))
    (setting,) = read_settings("tome 0.4", model)
    found = [
        retrieved(tower.image_features(cls), texts)["text_to_image_r1"]
        for cls in (setting.model(images).detach(), dense_cls(model, folder))
    ]
    expected = bootstrap_interval((found[0] - found[1]).numpy())._asdict()
    assert reduced["differences"]["dense"]["text_to_image_r1"] == pytest.approx(expected, abs=2e-5)
    assert document["photographs"]["captions"] == 24


def test_a_query_guides_the_second_encoding_of_its_candidates(
    folder, captions, tower_file, model, results
):
    options = ("--settings", PLAIN, "--queries", 8, "--candidates", 4)
    document = results(*options, "--guided", f"{AGAIN}, {GUIDED}, {UNGUIDED}")["guided"]
    dense, first, again, guided, unguided = document["settings"]
    assert guided["by_text"]["against"] == UNGUIDED and "by_text" not in unguided
    assert guided["by_text"]["difference"]["r1"]["mean"] == pytest.approx(
        guided["r1"]["mean"] - unguided["r1"]["mean"]
    )
    assert dense["second_flops"] == first["second_flops"] == 0
    assert guided["second_flops"] == pytest.approx(4 * guided["flops"], abs=1e-3)
    assert document["against"] == AGAIN and "difference" not in again
    tower, texts = texts_of(tower_file, folder, captions)
    (images,) = batches(photograph_paths(folder))
    plain, second = read_settings(f"{PLAIN}, {GUIDED}", model)
    gallery = tower.image_features(plain.model(images).detach())
    hits, changed = [], False
    for query in range(8):
        text = texts[query][0]
        candidates = (gallery @ text).topk(4).indices
        with elip_models.guidance(second.model, tower.as_cls(text[None]).detach()):
            other = tower.image_features(second.model(images[candidates]).detach())
        hits.append(float(candidates[(other @ text).argmax()] == query))
        changed |= not torch.allclose(other, gallery[candidates], atol=1e-3)
    assert changed and guided["r1"]["mean"] == pytest.approx(sum(hits) / 8)
    assert document["among_candidates"] >= guided["r1"]["mean"] > 0


def test_a_second_encoding_like_the_first_keeps_the_ranks(results):
    options = ("--settings", PLAIN, "--queries", 6, "--candidates", 3)
    same = "tome:proportional=true 0.5"
    document = results(*options, "--guided", f"{same}, guided_tome:fusion=1 0.5")["guided"]
    _, first, again, unguided = document["settings"]
    assert set(first["difference"]["reciprocal_rank"].values()) == {0.0}
    assert first["r1"] == again["r1"] and unguided["second_flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guided", AGAIN, "--first", "evit 0.5"], "first: expected one of the settings"),
        (["--guided", PLAIN], "guided: expected other settings than --first, got 'tome 0.5'"),
        (["--guided", AGAIN, "--queries", "13"], "queries: expected 1 to 12, the photographs"),
        (["--against", "dense, evit 0.5"], "against: expected some of the settings, got 'evit"),
        (["--output", "absent/x.json"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_refused(folder, captions, tower_file, capsys, arguments, message):
    given = [folder, "--tower", tower_file, "--captions", captions]
    given += ["--settings", PLAIN, *arguments]
    with pytest.raises(SystemExit, match="2"):
        retrieval.main([*map(str, given)])
    assert message in capsys.readouterr().err


def test_photographs_without_captions_are_refused(results, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a0.png#0\ta pagoda .")
    with pytest.raises(SystemExit, match="2"):
        results("--settings", PLAIN, "--captions", tmp_path / "captions.txt")
    assert "expected some of every photograph, got none of a1.png" in capsys.readouterr().err


def test_flops_are_computed_again_and_nothing_else_changes(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "onnx_error", lambda model, paths: {"images": len(paths)})
    file = tmp_path / "results.json"
    setting = "tome:class_token_only=true 0.5"
    options = ["--images", "12", "--settings", setting, "--output", str(file)]
    assert bench.main([str(folder), *options]) == 0
    right = json.loads(file.read_text())
    wrong = json.loads(file.read_text())
    wrong["settings"][0]["flops"] += 0.1
    file.write_text(json.dumps(wrong))
    assert bench.main(["--flops", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found.pop("flops_commit") == right["commit"] and found == right
    wrong["settings"][0]["kept"] += 0.1
    file.write_text(json.dumps(wrong))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--flops", str(file)])
    assert json.loads(file.read_text()) == wrong
