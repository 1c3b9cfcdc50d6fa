"""The long description of the package: README.md with links that work on a package index.

All other metadata is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def long_description(repository: str | None) -> str:
    """Return README.md, its relative links at this version's tag of a GitHub repository, if any."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if repository is None:
        return text
    package = (ROOT / "elip_kernels" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    for link, kind in ((r"(!\[[^]]*\]\()", "raw"), (r"((?<!!)\[[^]]*\]\()", "blob")):
        base = f"{repository}/{kind}/v{version}/"
        text = re.sub(link + r"(?!https?:|#)", rf"\1{base}", text)
    return text


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    setup(
        long_description=long_description(project["urls"].get("Repository")),
        long_description_content_type="text/markdown",
    )
