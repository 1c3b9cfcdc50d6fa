"""The ops use documented interfaces of PyTorch and Triton; `_private.py` has the exceptions."""

import re
from pathlib import Path

import elip_kernels

PRIVATE = re.compile(r"\._dynamo_|\b(?:torch|triton)(?:\.\w+)*\._(?!python_dispatch)[a-zA-Z]")


def test_private_names_are_in_one_file():
    """`torch.utils._python_dispatch` is documented as the module of `TorchDispatchMode`."""
    folder = Path(elip_kernels.__file__).parent
    lines = {path.name: path.read_text().splitlines() for path in folder.rglob("*.py")}
    private = {name: [*filter(PRIVATE.search, text)] for name, text in lines.items()}
    assert len(private.pop("_private.py")) == 3
    assert not any(private.values()), private
