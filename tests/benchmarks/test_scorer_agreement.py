"""Agreement of the scorers, on the tokens that `exact` keeps."""

import pytest

from benchmarks.scorer_agreement import scorer_agreement
from elip_models import ELIP
from elip_models.strategies.scorers import SCORERS
from tests.helpers.models import ROTARY
from tests.helpers.own_warnings import SLOW_SCORER
from tests.helpers.towers import SCHEDULE, clip_vit, images, text


@SLOW_SCORER
@pytest.mark.parametrize("make", [clip_vit, ROTARY["DINOv3"]], ids=["timm", "rotary"])
def test_each_scorer_is_compared_with_exact_at_every_stage(make):
    shares = scorer_agreement(make().eval(), images(4), text(4), ELIP(SCHEDULE, scorer="last"))
    assert list(shares) == [*(name for name in SCORERS if name != "exact"), "chance"]
    assert shares["official"] == [1.0] * 3  # the paper's own choice, up to rounding
    # 36 patches keep 28, 18, 10; from the second stage on a merged token is a candidate too.
    assert shares["chance"] == [8 / 36, 11 / 29, 9 / 19]
    assert all(0 <= share <= 1 for each in shares.values() for share in each)
    assert min(shares["bf16"]) > 0.7  # near ties alone are decided otherwise
    assert shares["alternate"] == [1.0] * 3  # of stages of one or two layers it is the same
    assert shares["last"] != shares["official"]
