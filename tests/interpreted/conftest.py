"""Collected only with TRITON_INTERPRET=1: tests/kernels/test_interpreter.py starts a process."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def launches():
    """Run the kernels on CPU tensors; count the launches by op."""
    from elip_kernels.testing import kernels_on_cpu

    with kernels_on_cpu() as counter:
        yield counter
