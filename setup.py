"""The long description of the package: README.md with links that work outside the repository.

All other metadata is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def long_description() -> str:
    """Return README.md with its relative links and pictures at this version's tag."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    package = (ROOT / "elip_kernels" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link, kind in ((r"(!\[[^]]*\]\()", "raw"), (r"((?<!!)\[[^]]*\]\()", "blob")):
        base = f"{project['urls']['Repository']}/{kind}/v{version}/"
        text = re.sub(link + r"(?!https?:|#)", rf"\1{base}", text)
    return text


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
