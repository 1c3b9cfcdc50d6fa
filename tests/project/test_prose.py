"""Phrases that a reader who has not built the project stumbles over stay out of its texts."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRIVATE = {
    r"not told": "no significant difference",
    r"\bis said\b": "name what is stored, returned or warned",
    r"not seen to": "showed no significant ..",
    r"said aloud": "warned",
    r"those of which": "two sentences",
    r"^So go \b": "subject, verb, object",
    r"is asked for by": "an active verb",
    r"has nothing to say": "a plain verb",
    r"of its own accord": "by default",
    r"what a compiler says no to": "compile failures",
    r"(?<![\w.])\.\d\d? of (?:a|the|its)\b": "0.71, with the leading zero",
}
TEXTS = ("README.md", "docs/*.md", "docs/**/*.md", "*.py", "*.yaml")


def texts():
    """Return the tracked texts of the project; the changelog quotes old names."""
    command = ["git", "ls-files", *TEXTS]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split() if name != "tests/project/test_prose.py"]
    assert "README.md" in names and "elip_kernels/ops/reduce.py" in names
    return [ROOT / name for name in names if (ROOT / name).is_file()]


@pytest.mark.parametrize("phrase", PRIVATE)
def test_no_private_phrase(phrase):
    pattern = re.compile(phrase, re.IGNORECASE | re.MULTILINE)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {PRIVATE[phrase]!r} instead:\n" + "\n".join(found)
