"""Arguments of embed: some that pass, and of each what is refused, without its options."""

import tempfile
from pathlib import Path

from PIL import Image

import elip_models


def good():
    folder = Path(tempfile.mkdtemp())
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    options = {"pretrained": False, "check": 0, "workers": 0}
    return options | {
        "model": "timm:vit_tiny_patch16_224",
        "source": folder,
        "output": tempfile.mkdtemp(),
        "keep": 0.7,
    }


TABLE = {
    elip_models.embed: (
        good,
        {
            "model": [None, 3, "nope", "timm:nope"],
            "source": ["no/such/folder"],
            "output": [__file__],
            "reduce": [3, "tomee"],
            "keep": [0, 2, "half"],
            "progress": [],
            "report": [],
        },
    )
}
