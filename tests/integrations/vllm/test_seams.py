"""Names of vLLM in the source of a version, without its import."""

import pytest

from benchmarks.vllm_seams import missing_in

FILES = {
    "vllm/__init__.py": "from .models import Registry as ModelRegistry\n",
    "vllm/models/__init__.py": "from vllm.models.base import Kind\nRegistry = Kind()\n",
    "vllm/models/base.py": (
        "class Base:\n    def own(self): ...\nclass Kind(Base):\n    def more(self): ...\n"
    ),
}


@pytest.mark.parametrize(
    ("name", "is_there"),
    [
        ("vllm:ModelRegistry", True),
        ("vllm:ModelRegistry.more", True),
        ("vllm:ModelRegistry.own", True),
        ("vllm.models.base:Kind.own", True),
        ("vllm:ModelRegistry.other", False),
        ("vllm.models:Nothing", False),
        ("vllm.nothing:Kind", False),
    ],
)
def test_a_name_is_found_where_an_import_would_find_it(tmp_path, name, is_there):
    for path, text in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert missing_in(tmp_path, (name,)) == ([] if is_there else [name])
