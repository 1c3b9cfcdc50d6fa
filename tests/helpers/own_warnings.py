"""Marks of tests in which this library warns with reason, and which are not about the warning."""

import pytest

UNGUIDED = pytest.mark.filterwarnings("ignore::elip_models.user_warnings.UnguidedWarning")
"""Strategies that read no text get one, or images come without a text."""
SLOW_SCORER = pytest.mark.filterwarnings("ignore::elip_models.user_warnings.SlowScorerWarning")
"""A scorer costs more than it saves in a tower of a few layers."""
FALLBACK = pytest.mark.filterwarnings("ignore::elip_kernels._operator.FallbackWarning")
"""The PyTorch implementation runs, since the kernels do not support a dtype or a size."""
NEW_PARTS = pytest.mark.filterwarnings("ignore::elip_models.saving.dense_models.NewPartsWarning")
"""A folder has no weights for the pooler."""
NO_IMAGE_STATS = pytest.mark.filterwarnings("ignore:\\w+ stores no mean and standard deviation")
"""A tiny model has no preprocessing."""
