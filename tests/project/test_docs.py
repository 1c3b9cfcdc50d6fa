"""README and docs: Python blocks run, commands parse, links and generated tables are up to date."""

import re
import shlex
import sys
import unicodedata
from functools import partial
from pathlib import Path
from pydoc import locate
from unittest.mock import Mock

import open_clip
import pytest
import timm
import torch
import transformers
from PIL import Image

import elip_kernels
import elip_models
from elip_models.pretraining.models import registry
from elip_models.pretraining.tasks.registry import TASKS
from elip_models.pretraining.training.recipe import FINETUNE, recipe_names
from tests.helpers.models import dinov2
from tests.helpers.own_warnings import UNGUIDED
from tests.helpers.programs import PROGRAMS, parse
from tests.helpers.scripts import load_script
from tests.helpers.tiers import slow_except
from tests.vlm.models import build
from tests.vlm.test_retrieval import made as retrieval

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "api"),
]
WITH_PYTHON = [
    page for page in PAGES if page.name != "data.md"
]  # tests/pretraining/data/test_mixture.py
META_PAGES = ("README.md", "index.md", "calibrate.md", "faster.md", "models.md", "rates.md")
"""Pages whose code uses ViT-B, which runs on the meta device: no memory, no time."""
CPU_WORDS = ("open_clip", "from_pretrained", "save_reduced")
"""A block with one of these runs on the CPU, also in a page of `META_PAGES`."""
SLOW_PAGES = ("faster.md", "how_it_works.md", "index.md", "serve.md", "strategies.md")


def blocks(page, language):
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


PRINTS = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
"""A Python block of a page, and what the page says that it prints."""
OTHER_SIZES = ("vlm.md", "vlm_semantics.md")
"""Pages whose models are replaced by smaller ones, which print other numbers."""


def script(name):
    """Return docs/NAME.py as a module."""
    return load_script(DOCS / f"{name}.py")


def inputs(page):
    """Return the images, texts and loader that the code of a page expects."""
    is_training = page.name == "training.md"
    size, length = (64, 32) if is_training else (224, 77)
    ids = torch.randint(3, 900, (2, length), device="cpu")
    ids[:, 0], ids[:, -1] = 1, 2
    batch = (torch.randn(2, 3, size, size), ids, torch.ones_like(ids))
    return {
        "images": batch[0],
        "input_ids": ids,
        "texts": ids,
        "attention_mask": batch[2],
        "text_cls": torch.randn(2, 192),
        "loader": [batch],
    }


def from_folder_or(model, load, name, **options):
    """Load a folder as `from_pretrained` does; return `model` for a name on the hub."""
    return load(name, **options) if Path(name).is_dir() else model


@pytest.fixture
def small_models(monkeypatch, page):
    """Make timm create models without downloads, and this library its tiny models."""
    create_timm_model, create_own_model = timm.create_model, elip_models.create_model
    sizes = {"depth": 3} if page.name == "serve.md" else {}  # whose blocks are traced twice

    def without_weights(name, pretrained=False, **options):
        return create_timm_model(name, **sizes | options)

    def tiny(name, **options):
        return create_own_model(f"elip_{name.split('_')[1]}_tiny", **options)

    def pair_without_weights(name, pretrained=None, **options):
        return create_open_clip(name, **options)

    create_open_clip = open_clip.create_model_and_transforms
    llava, prompt = build("llava", rows=((1, "image", 3),))
    retriever, pages = retrieval("colpali")
    query = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3).long()}
    processor = Mock(side_effect=lambda images=None, text=None: pages if images else query)
    processor.score_retrieval = partial(transformers.ColPaliProcessor.score_retrieval, processor)
    pretrained = {
        "AutoModelForDepthEstimation": script("dense").depth_anything(script("dense").flat),
        "ColPaliForRetrieval": retriever,
        "ColPaliProcessor": processor,
        "AutoModel": dinov2(num_hidden_layers=6),
        "AutoProcessor": Mock(return_value=prompt),
        "LlavaForConditionalGeneration": llava,
        "LlavaOnevisionForConditionalGeneration": build("llava_onevision")[0],
        "Qwen2_5_VLForConditionalGeneration": build("qwen2_5_vl")[0],
    }
    for name, model in pretrained.items():
        cls = getattr(transformers, name)
        load = partial(from_folder_or, model, cls.from_pretrained)
        monkeypatch.setattr(cls, "from_pretrained", load)
    segmenter = Mock()  # of segmentation_models_pytorch, which tests do not need
    segmenter.DPT.return_value.encoder.model = without_weights("vit_tiny_patch16_224")
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", segmenter)
    monkeypatch.setattr(open_clip, "create_model_and_transforms", pair_without_weights)
    monkeypatch.setattr(timm, "create_model", without_weights)
    for module in (registry, elip_models):
        monkeypatch.setattr(module, "create_model", tiny)


PYTHON = [page for page in WITH_PYTHON if blocks(page, "python")]


@UNGUIDED
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "page",
    slow_except([page for page in PYTHON if page.name not in SLOW_PAGES], PYTHON),
    ids=lambda page: page.name,
)
def test_the_python_of_a_page_runs_and_prints_what_it_says(
    page, small_models, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("photograph.jpg")
    names = {"elip_models": elip_models, "range": lambda stop: range(min(stop, 3))}
    for code, printed in PRINTS.findall(page.read_text()):
        on_cpu = page.name not in META_PAGES or any(word in code for word in CPU_WORDS)
        with torch.device("cpu" if on_cpu else "meta"):
            names |= inputs(page)
            if on_cpu and page.name != "training.md":
                names["model"] = timm.create_model("vit_tiny_patch16_224")
            capsys.readouterr()
            exec(compile(code, page.name, "exec"), names)
        if printed and page.name not in OTHER_SIZES:
            assert capsys.readouterr().out == printed


COMMAND = re.compile(
    r"^(?:elip|.*&& elip|torchrun .* -m elip_models\.cli|(python -m benchmarks\.\w+)) *(.*)$",
    re.MULTILINE,
)


def test_the_commands_of_all_pages_parse():
    shell = "".join(code for page in PAGES for code in blocks(page, "bash"))
    programs = {"elip", *(f"python -m {module}" for module in PROGRAMS)}
    commands = [
        (program or "elip", words)
        for program, words in COMMAND.findall(shell.replace("\\\n", " "))
        if (program or "elip") in programs
    ]
    assert {program for program, _ in commands} == programs
    for program, line in commands:
        parse([*program.split(), *shlex.split(line, comments=True)])


RECIPES = {name.rpartition("/")[2] for name in recipe_names() + recipe_names(FINETUNE)}
NAMES_A_RECIPE = re.compile(
    r"(?:elip (?:train|finetune)|elip recipes show|base:) ([\w./]+)"
    rf"|`(?:finetune/)?((?:{'|'.join(TASKS)})_[a-z]\w+)`"
)


def recipes_on(page):
    """Return the names of recipes on a page, without their folder."""
    named = {a or b for a, b in NAMES_A_RECIPE.findall(page.read_text())}
    return {name.rpartition("/")[2] for name in named}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipes_on_a_page_exist(page):
    assert recipes_on(page) <= RECIPES | set(TASKS) | {"TASK"}


@pytest.mark.slow
def test_the_table_of_larger_models_agrees_with_the_counts():
    text = (DOCS / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert rows
    for name, cells in rows:
        with torch.device("meta"):
            model = timm.create_model(name)
        last, exact = (
            elip_models.reduction_summary(
                elip_models.reduce_(model, schedule="clip", scorer=scorer)
            )
            for scorer in ("last", "exact")
        )
        tome = elip_models.reduction_summary(
            elip_models.reduce_(model, strategy="tome", keep=last.keep)
        )
        shares = [each for x in (last, exact) for each in (x.training_flops, x.forward_flops)]
        sizes = [str(last.dense_tokens), str(len(last.tokens))]
        assert cells.split(" | ") == [*sizes, *(f"{x:.2f}" for x in (*shares, tome.training_flops))]


def test_the_summary_on_the_first_pages_is_what_is_printed():
    with torch.device("meta"):
        model = elip_models.reduce_(timm.create_model("vit_base_patch16_224"))
    summary = elip_models.reduction_summary(model)
    assert f"```text\n{summary}\n```" in (DOCS / "index.md").read_text()
    share = f"  # {round(summary.forward_flops, 2)} of the dense FLOPs\n"
    assert share in (ROOT / "README.md").read_text()


def test_the_pages_of_language_models_have_what_a_llava_of_full_size_prints():
    with torch.device("meta"):  # the config's defaults are those of llava-1.5-7b-hf, in fp16
        llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig()).half()
        summary = elip_models.reduction_summary(elip_models.reduce_(llava, keep=0.25))
        inside = elip_models.reduction_summary(
            elip_models.reduce_(elip_models.unreduce_(llava), "fastv", keep=0.25)
        )
    assert f"```text\n{summary}\n```" in (DOCS / "vlm.md").read_text()
    share = f"```text\n{round(inside.prefill_flops, 3)}\n```"
    assert share in (DOCS / "vlm_semantics.md").read_text()


def test_keep_is_about_the_share_of_the_flops():
    for keep in (0.3, 0.5, 0.7, 0.9):
        with torch.device("meta"):
            model = elip_models.reduce_(timm.create_model("vit_base_patch16_224"), keep=keep)
        cost = elip_models.reduction_summary(model).forward_flops
        assert cost == pytest.approx(keep, abs=0.02)


def anchors(page):
    """Return the anchors of a page: those of its headings, and explicit ones."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", title).encode("ascii", "ignore") for title in titles]
    words = [re.sub(r"[^\w\s-]", "", title.decode()).strip().lower() for title in plain]
    return {re.sub(r"[-\s]+", "-", each) for each in words} | set(re.findall(r'id="(\S+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (elip_kernels, elip_models)
    for name in package.__all__
}


def test_the_reference_gives_the_path_by_which_a_user_imports():
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    entries = re.findall(r"^::: (.*)$", pages, re.MULTILINE)
    assert len(set(entries)) == len(entries)
    path_of = {id(value): path for path, value in PUBLIC.items()}
    assert [path_of.get(id(locate(entry)), entry) for entry in entries] == entries
    assert {entry for entry in entries if entry.startswith("elip_kernels.")} <= PUBLIC.keys()
    members = " ".join(re.findall(r"members: \[(.*)\]", pages)).replace(",", " ").split()
    parts = [part for entry in entries for part in entry.split(".")]
    assert [part for part in parts + members if part.startswith("_")] == []


SCRIPTS = ("readme_table", "readme_chart", "serving", "api_table", "recipes", "panel", "vlm")
SCRIPTS += ("onnx_exports",)


@pytest.mark.parametrize(
    "name", slow_except(SCRIPTS, [*SCRIPTS, "studies", "real_model", "supported", "dense"])
)
def test_the_tables_of_a_script_are_up_to_date(name):
    assert script(name).main(["--check"]) == 0
