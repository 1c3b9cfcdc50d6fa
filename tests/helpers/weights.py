"""Two models hold the same weights."""

import torch


def assert_equal_weights(got, expected):
    """Every parameter and buffer of the module `expected` is in `got`, bit for bit, wherever it
    lies; those that `got` has beside them are its own."""
    found = got.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(found[name].to(weight.device), weight), name
