"""Files about the repository: addresses and versions agree, CI runs the commands of .ci/run."""

import importlib.util
import re
import tomllib
from pathlib import Path

import yaml

import elip_kernels

ROOT = Path(__file__).parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_every_address_of_the_project_is_one_of_its_metadata():
    address = re.compile(r"github\.com/[\w-]+/elip-kernels|[\w-]+\.github\.io/elip-kernels")
    allowed = address.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    kinds = ("*.md", "*.yml", "*.toml", "*.cff", "*.py", "docs/**/*.md", ".github/**/*.*")
    for path in {path for kind in kinds for path in ROOT.glob(kind)}:
        text = path.read_text(encoding="utf-8")
        assert set(address.findall(text)) <= set(allowed), path
        assert not re.search(r"\bOWNER\b", text), f"{path}: a placeholder"


def test_the_citation_and_the_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == elip_kernels.__version__
    assert f"version = {{{citation['version']}}}" in (ROOT / "README.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert released[0] == (citation["version"], citation["date-released"])
    assert changelog.count("\n## [Unreleased]\n") == 1


def commands(text):
    """Return the commands of a script without options that only change what is printed."""
    lines = re.sub(r" --quiet| --disable-pip-version-check", "", text).splitlines()
    return [each for line in lines for each in line.split(" && ") if each]


def test_ci_runs_the_commands_of_the_script():
    script = (ROOT / ".ci" / "run").read_text().partition('VIRTUAL_ENV="$venv"\n')[2]
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    run = [each for step in steps for each in commands(step.get("run", ""))]
    wanted = commands(re.sub(r"(?m)^command -v chromedriver.*$", "", script))
    assert "pytest" in wanted and "zensical build --strict" in wanted
    assert [command for command in wanted if command not in run] == []


def test_the_script_installs_nothing_before_the_test_command_of_the_readme():
    before, test, _ = (ROOT / ".ci" / "run").read_text().partition(" && pytest\n")
    installs = [line for line in before.splitlines() if "install" in line]
    readme = re.search(r"^(pip install .*) && pytest$", (ROOT / "README.md").read_text(), re.M)
    assert test and [commands(line) for line in installs] == [[readme[1]]]


def test_ci_tests_every_python_that_the_metadata_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: 3."
    named = [each.removeprefix(prefix) for each in project["classifiers"] if prefix in each]
    tested = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    assert tested == [f"3.{minor}" for minor in named]
    assert project["requires-python"] == f">={tested[0]}"


def test_the_navigation_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    text = yaml.dump(config["nav"])
    listed = set(re.findall(r"[\w/]+\.md", text))
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    unlisted = {page for page in pages if page.endswith("-ops.md") or page.startswith("studies/")}
    assert listed == pages - unlisted


REPOSITORY = "https://github.com/someone/a-repository"


def description(repository):
    """Return the long description of the package."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.long_description(repository)


def test_the_links_of_the_description_work_outside_the_repository():
    text = description(REPOSITORY)
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", text)
    own = [(picture, link) for picture, link in links if link.startswith(REPOSITORY)]
    assert len(own) > 20 and all(link.startswith("https://") for _, link in links)
    for picture, link in own:
        kind = "raw" if picture else "blob"
        base = f"{REPOSITORY}/{kind}/v{elip_kernels.__version__}/"
        assert (ROOT / link.removeprefix(base).partition("#")[0]).exists(), link
