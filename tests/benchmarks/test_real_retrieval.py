"""`benchmarks.real.text_tower` and `benchmarks.real.retrieval`: training, ranking, re-ranking."""

import json

import pytest
import torch
import torch.nn.functional as F

import elip_models
from benchmarks.real import __main__ as bench
from benchmarks.real import retrieval, text_tower
from benchmarks.real.evaluation import read_settings
from benchmarks.real.measures import retrieved
from benchmarks.real.photographs import batches, photograph_paths
from elip_models.tasks.intervals import bootstrap_interval

PLACES = ("a roof", "a lake", "the sky", "red leaves", "a petal", "green grass")
PLAIN, GUIDED = "tome 0.5", "guided_tome:fusion=0,guidance_norm=match 0.5"


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
    arguments += ["--output", made / "tower.safetensors", "--features", made / "cls.safetensors"]
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


def test_a_trained_tower_finds_its_training_images(folder, captions, tower_file, model):
    tower, texts = texts_of(tower_file, folder, captions)
    cls = text_tower.dense_features(model, photograph_paths(folder), lambda _: None)
    assert retrieved(tower.image_features(cls), texts)["text_to_image_r1"].mean() > 0.7
    together = tower(["a pagoda", "red leaves and a flower in the middle of green grass"])
    torch.testing.assert_close(tower(["a pagoda"]), together[:1])
    back = tower.image_features(tower.as_cls(texts[0]))
    torch.testing.assert_close(back, texts[0], atol=1e-4, rtol=0)


def test_stored_features_are_those_of_the_same_photographs(
    folder, captions, tower_file, tmp_path, capsys
):
    (tmp_path / "fewer.txt").write_text("a0.png\nb0.png")
    fewer = ["--train", tmp_path / "fewer.txt", "--dev", tmp_path / "fewer.txt"]
    arguments = [folder, "--captions", captions, *fewer, "--output", tmp_path / "x.safetensors"]
    arguments += ["--features", tower_file.with_name("cls.safetensors")]
    with pytest.raises(SystemExit, match="2"):
        text_tower.main([*map(str, arguments)])
    assert "features: expected those of these photographs" in capsys.readouterr().err


def test_recall_of_reduced_images_is_paired_with_dense(
    folder, captions, tower_file, model, results
):
    document = results("--settings", "tome:r=0, tome 0.4")
    dense, same, reduced = document["settings"]
    assert dense["flops"] == same["flops"] == 1 > reduced["flops"]
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert same["difference"] == dict.fromkeys(same["difference"], zero)
    tower, texts = texts_of(tower_file, folder, captions)
    (images,) = batches(photograph_paths(folder))
    whole, (setting,) = text_tower.dense_features, read_settings("tome 0.4", model)
    found = [
        retrieved(tower.image_features(cls), texts)["text_to_image_r1"]
        for cls in (
            setting.model(images).detach(),
            whole(model, photograph_paths(folder), lambda _: None),
        )
    ]
    expected = bootstrap_interval((found[0] - found[1]).numpy())._asdict()
    assert reduced["difference"]["text_to_image_r1"] == pytest.approx(expected, abs=2e-5)
    assert document["photographs"]["captions"] == 24


def test_a_query_guides_the_second_encoding_of_its_candidates(
    folder, captions, tower_file, model, results
):
    before = results("--settings", "tome 0.5")
    options = ("--first", PLAIN, "--queries", 8, "--candidates", 4)
    document = results(*options, "--guided", f"{PLAIN}, {GUIDED}")
    guided = document.pop("guided")
    assert document == before
    dense, first, row = guided["settings"]
    assert dense["second_flops"] == 0 and first["second_flops"] == pytest.approx(4 * first["flops"])
    tower, texts = texts_of(tower_file, folder, captions)
    (images,) = batches(photograph_paths(folder))
    plain, second = read_settings(f"{PLAIN}, {GUIDED}", model)
    gallery = tower.image_features(plain.model(images).detach())
    hits, changed = [], False
    for query in range(8):
        text = texts[query][0]
        candidates = (gallery @ text).topk(4).indices
        with elip_models.guidance(second.model, tower.as_cls(text[None]).detach()):
            again = tower.image_features(second.model(images[candidates]).detach())
        hits.append(float(candidates[(again @ text).argmax()] == query))
        changed |= not torch.allclose(again, gallery[candidates], atol=1e-3)
    assert changed and row["r1"]["mean"] == pytest.approx(sum(hits) / 8)
    assert guided["found"] >= row["r1"]["mean"] > 0


def test_a_second_encoding_without_guidance_keeps_the_ranks(results):
    results("--settings", "tome 0.5")
    options = ("--queries", 5, "--candidates", 3, "--guided", "tome 0.5, guided_tome:fusion=1 0.5")
    guided = results(*options, "--against", "tome 0.5")["guided"]
    _, first, unguided = guided["settings"]
    assert "difference" not in first and unguided["second_flops"] > 0
    assert 0 < first["reciprocal_rank"]["mean"] <= 1 and first["r1"]["mean"] <= guided["found"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--settings", "tome 0.5", "--against", "tome 0.6"],
            "against: expected one of the settings, got 'tome 0.6'",
        ),
        (["--guided", "tome 0.5"], "guided: expected --output"),
    ],
)
def test_wrong_arguments_are_refused(folder, captions, tower_file, capsys, arguments, message):
    given = [folder, "--tower", tower_file, "--captions", captions, *arguments]
    with pytest.raises(SystemExit, match="2"):
        retrieval.main([*map(str, given)])
    assert message in capsys.readouterr().err


def test_photographs_without_captions_and_too_many_queries_are_refused(
    folder, tower_file, results, tmp_path, capsys
):
    results("--settings", "tome 0.5")
    with pytest.raises(SystemExit, match="2"):
        results("--guided", "tome 0.5", "--queries", 13)
    assert "queries: expected 1 to 12, the photographs, got 13" in capsys.readouterr().err
    (tmp_path / "captions.txt").write_text("a0.png#0\ta pagoda .")
    with pytest.raises(SystemExit, match="2"):
        results("--settings", "tome 0.5", "--captions", tmp_path / "captions.txt")
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
