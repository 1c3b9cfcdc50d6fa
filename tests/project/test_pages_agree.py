"""Pages agree with the code and with each other: extras, options, names, files, output folders."""

import ast
import re
import shlex
import tomllib
from functools import cache
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name

import pytest
import typer

from elip_models.cli import COMMANDS, as_program, load_command
from elip_models.pretraining.training.recipe import recipe_names, recipe_settings
from elip_models.validation import EXTRAS
from tests.helpers.programs import PROGRAMS
from tests.project.test_docs import PAGES, ROOT, blocks
from tests.project.test_layout import MODULES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_OTHER_PROGRAMS = {
    "collections.md": {"--address"},  # ray
    "contributing.md": {"--strict"},  # zensical, twine
    "finetune.md": {"--dataset", "--dataset_root"},  # clip-benchmark
    "results.md": {"--arms", "--full"},  # a study that was removed, pytest
    "serve.md": {  # vLLM
        "--enable-dbo",
        "--enable-tower-connector-lora",
        "--pipeline-parallel-size",
        "--tensor-parallel-size",
        "--video-pruning-rate",
    },
    "training.md": {"--max-restarts", "--ntasks-per-node"},  # torchrun, srun
    "vlm.md": {"--benchmark-only", "--full", "--visualPrune"},  # pytest, TensorRT-Edge-LLM
}
"""Options in the text of pages that are not of this project's programs."""


def spans(page):
    """Return the inline code of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def requirements(extra):
    """Return what an extra lists: other extras of this package, and distributions."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        own = re.match(r"elip-kernels\[(.*)\]$", requirement)
        names |= set(own[1].split(",")) if own else {re.match(r"[\w.-]+(\[\w+\])?", requirement)[0]}
    return names


def installed(extra):
    """Return an extra and the extras that it contains."""
    inner = requirements(extra) & PROJECT["optional-dependencies"].keys() - {extra}
    return {extra}.union(*map(installed, inner))


@cache
def imports(path, inside_functions=False):
    """Return the names that a file imports when it is imported, or also when its functions run."""
    names, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


@cache
def needed(command):
    """Return the extras of all packages that a command of `elip` imports."""
    module = f"elip_models.commands.{COMMANDS[command][0].partition('.')[0]}"
    names = [*imports(MODULES[module], inside_functions=True)]
    for name in names:
        if name in MODULES:
            names += imports(MODULES[name]) - set(names)
    return {EXTRAS[top] for name in names if (top := name.partition(".")[0]) in EXTRAS}


STEP = re.compile(
    r'install -e "\.\[([\w,-]+)\]"|(?:^elip|&& elip|-m elip_models\.cli) (\w+)', re.MULTILINE
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_extras_that_a_page_installs_have_what_its_commands_import(page):
    extras, missing = set(), {}
    for installs, command in STEP.findall(page.read_text()):
        extras |= set().union(*map(installed, installs.split(","))) if installs else set()
        if extras and command and not needed(command) <= extras:
            missing[command] = needed(command) - extras
    assert not missing


def test_the_table_of_extras_is_that_of_the_package():
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* \| (.*) \|$", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE
    )
    of_development = {"bench", "test", "vllm-test", "docs"}
    assert {extra: {name.strip("` ") for name in names.split(",")} for extra, names in rows} == {
        extra: requirements(extra)
        for extra in PROJECT["optional-dependencies"].keys() - of_development
    }


def test_one_sentence_describes_the_project():
    for name in ("README.md", "docs/index.md", "mkdocs.yml"):
        assert PROJECT["description"] in " ".join((ROOT / name).read_text().split()), name


def options(command):
    """Return the options of a command of typer, and of its commands."""
    own = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return own.union(*map(options, getattr(command, "commands", {}).values()))


def test_each_option_in_the_text_of_a_page_exists():
    programs = [typer.main.get_command(as_program(program)) for program in PROGRAMS.values()]
    known = set().union(*map(options, [*map(load_command, COMMANDS), *programs]))
    for page in PAGES:
        named = {each for code in spans(page) for each in re.findall(r"(?<!\S)--\w[\w-]*", code)}
        assert named - known == OF_OTHER_PROGRAMS.get(page.name, set()), page.name


def test_each_name_and_file_in_the_text_of_a_page_exists():
    missing = []
    for page in PAGES:
        for code in spans(page):
            for name in re.findall(r"\belip_(?:models|kernels)(?:\.\w+)+", code):
                try:
                    resolve_name(name)
                except (ImportError, AttributeError):
                    missing.append((page.name, name))
            for name in re.findall(r"^(?:tests|benchmarks|docs|examples)/[\w/]+\.\w+", code):
                if not (ROOT / name).exists():
                    missing.append((page.name, name))
    assert missing == []


RUN = re.compile(
    r"(?:^elip|&& elip|-m elip_models\.cli) (train|finetune|embed) (.*)$", re.MULTILINE
)


def written(command, line):
    """Return the folder that a command writes, and what must be the same to write it again."""
    words = shlex.split(line, comments=True)
    options = dict(pairwise(words))
    if command == "embed":
        return options["--output"], *map(options.get, ("--model", "--reduce", "--keep"))
    values = dict(word.split("=", 1) for word in words[1:] if re.match(r"[\w.]+=", word))
    recipe, start = words[0], options.get("--from")
    if start is not None:
        family = Path(start).name.partition("_")[0]  # a task takes the recipe of the model's family
        names = (f"finetune/{recipe}", f"finetune/{recipe}_{family}")
        recipe = next(name for name in names if name in recipe_names("finetune"))
    default = next(each.value for each in recipe_settings(recipe) if each.key == "output_dir")
    model = {key: value for key, value in values.items() if key.startswith(("model.", "peft."))}
    return values.get("output_dir", default), recipe, start, *sorted(model.items())


def test_an_output_folder_has_one_content_on_all_pages():
    contents = {}
    for page in PAGES:
        shell = "".join(blocks(page, "bash")).replace("\\\n", " ")
        for command, line in RUN.findall(shell):
            folder, *content = written(command, line)
            contents.setdefault(folder, {})[tuple(content)] = page.name
    assert contents
    assert {folder: each for folder, each in contents.items() if len(each) > 1} == {}
