"""Names of the package: functions are not modules, and submodules import under their own path."""

import importlib
import inspect
from types import ModuleType

import pytest

import elip_kernels

FUNCTIONS = [n for n in elip_kernels.__all__ if inspect.isfunction(getattr(elip_kernels, n))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_no_module(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"elip_kernels.{name}")
    assert inspect.isfunction(getattr(elip_kernels, name))


def test_the_file_of_an_op_is_a_module():
    import elip_kernels.ops.reduce as module

    assert isinstance(module, ModuleType)
    assert module.reduce is elip_kernels.reduce
