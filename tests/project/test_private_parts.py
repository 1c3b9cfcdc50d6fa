"""No private part of another library is read, except those of a list; imports change nothing."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import elip_models.api

ROOT = Path(__file__).parents[2]
LIBRARIES = "torch|timm|transformers|open_clip|peft|accelerate|vllm"
PRIVATE = re.compile(
    r"torch\._C\b|torch\._subclasses|\._attn_implementation|__globals__|\._compiled_call_impl"
    r"|\._forward_(?:pre_)?hooks"
    rf"|(?:from|import) (?:{LIBRARIES})\b[\w.]*\._\w+|from (?:{LIBRARIES})\b[\w.]* import _\w+"
)
LISTED = {
    "torch._C": ["engine/_private.py"],
    "._compiled_call_impl": ["engine/install.py", "engine/reduced_block.py"],
    "._forward_hooks, ._forward_pre_hooks": ["towers/tower_parts.py"],
    "._attn_implementation": ["vlm/attention_probe.py"],
    "from torch.utils._python_dispatch": ["profiling/component_profile.py"],
    "from torch.distributed import _functional_collectives": [
        "pretraining/models/layers/distributed.py"
    ],
}
"""The private parts that the page "Contributing" gives reasons for, and the files with them."""


def test_private_parts_are_those_of_the_list():
    listed = {
        (name, file)
        for names, files in LISTED.items()
        for name in names.split(", ")
        for file in files
    }
    folder = ROOT / "elip_models"
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    found = {(name, file) for file, text in files.items() for name in PRIVATE.findall(text)}
    assert found == listed


def test_the_page_has_the_list():
    page = (ROOT / "docs" / "contributing.md").read_text()
    section = page.partition("## Private parts")[2].partition("\n## ")[0]
    for names in LISTED:
        for name in re.findall(r"_\w+", names):
            assert name in section


@pytest.mark.parametrize(
    "line",
    [
        "from torch._C import x",
        "torch._C.x()",
        "from torch.utils import _pytree",
        "from timm.models._hub import x",
        "config._attn_implementation = None",
        "function.__globals__",
        "module._forward_pre_hooks",
    ],
)
def test_the_pattern_finds(line):
    assert PRIVATE.search(line)


def test_importing_the_package_adds_no_hook_to_modules_of_others():
    called = []

    def note(frame, event, value):
        if event == "call" and frame.f_globals["__name__"].startswith("elip_"):
            called.append(frame.f_code.co_qualname)

    assert elip_models.api.reduce_
    sys.setprofile(note)
    try:
        module = nn.Module()
        module.child = nn.Linear(2, 2)
        module.register_parameter("scale", nn.Parameter(torch.ones(2)))
        module.register_buffer("shift", torch.zeros(2))
        module.child(module.scale + module.shift).sum().backward()
    finally:
        sys.setprofile(None)
    assert not called
