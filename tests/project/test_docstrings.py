"""A method is documented where its name first appears; ruff checks all other docstrings."""

import importlib
import inspect
from functools import cached_property

from tests.project.test_layout import MODULES

METHODS = (property, cached_property, classmethod, staticmethod)
NOT_INSTALLED = "elip_models.integrations.vllm"


def _is_documented(cls, name):
    own = [c for c in cls.__mro__ if c.__module__.startswith(("elip_kernels", "elip_models"))]
    return any(getattr(vars(c).get(name), "__doc__", None) for c in own)


def test_every_public_method_or_the_one_that_it_overrides_has_a_docstring():
    bare = []
    for module in (name for name in MODULES if not name.startswith(NOT_INSTALLED)):
        for cls in vars(importlib.import_module(module)).values():
            if not inspect.isclass(cls) or cls.__module__ != module or cls.__name__[0] == "_":
                continue
            for name, value in vars(cls).items():
                is_method = inspect.isfunction(value) or isinstance(value, METHODS)
                if is_method and name[0] != "_" and not _is_documented(cls, name):
                    bare.append(f"{module}.{cls.__name__}.{name}")
    assert bare == []
