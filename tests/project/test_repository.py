"""Files about the repository: versions agree, and every page and link is found."""

import importlib.util
import re
from pathlib import Path

import yaml

import elip_kernels

ROOT = Path(__file__).parents[2]


def test_the_citation_and_the_changelog_have_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == elip_kernels.__version__
    assert f"version = {{{citation['version']}}}" in (ROOT / "README.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert released[0] == (citation["version"], citation["date-released"])
    assert changelog.count("\n## [Unreleased]\n") == 1


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
    assert len(own) > 10 and all(link.startswith("https://") for _, link in links)
    for picture, link in own:
        kind = "raw" if picture else "blob"
        base = f"{REPOSITORY}/{kind}/v{elip_kernels.__version__}/"
        assert (ROOT / link.removeprefix(base).partition("#")[0]).exists(), link
