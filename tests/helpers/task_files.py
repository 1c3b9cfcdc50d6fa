"""Files of data that tests write: JSON of any format, and images of one colour."""

import json
from pathlib import Path

from PIL import Image


def write(path: Path, content) -> Path:
    """Write JSON, or one JSON object per line for a tuple of lines."""
    lines = isinstance(content, tuple)
    text = "".join(json.dumps(line) + "\n" for line in content) if lines else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def draw(path: Path, colour="red", size=(6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path
