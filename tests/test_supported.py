"""The README's table of supported models is what the code answers now."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments):
    command = [sys.executable, ROOT / "docs" / "supported.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_readme_is_up_to_date():
    result = run("--check")
    assert result.returncode == 0, result.stderr


def test_a_stale_table_is_seen_and_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- supported:begin -->\nold\n<!-- supported:end -->\nafter\n")
    assert run("--check", "--readme", readme).returncode == 1
    assert run("--readme", readme).returncode == 0
    assert run("--check", "--readme", readme).returncode == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| timm ViT (`vit_base_patch16_224`) | yes | yes |" in text
    readme.write_text("no markers")
    assert run("--readme", readme).returncode == 1
    assert readme.read_text() == "no markers"
