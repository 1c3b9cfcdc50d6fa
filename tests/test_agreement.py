"""How far scorers choose alike, on the tokens that `exact` lets through."""

import pytest

from elip_models import Elip
from elip_models.analysis.agreement import scorer_agreement
from tests.models import ROTARY
from tests.towers import SCHEDULE, clip_vit, images, text


@pytest.mark.parametrize("make", [clip_vit, ROTARY["DINOv3"]], ids=["timm", "rotary"])
def test_each_scorer_is_compared_with_exact_at_every_stage(make):
    shares = scorer_agreement(make().eval(), images(4), text(4), Elip(SCHEDULE, scorer="last"))
    assert list(shares) == ["official", "cls", "last", "chance"]
    assert shares["official"] == [1.0] * 3  # the paper's own choice, up to rounding
    # 36 patches keep 28, 18, 10; from the second stage on a merged token is a candidate too.
    assert shares["chance"] == [8 / 36, 11 / 29, 9 / 19]
    for name in ("cls", "last"):
        assert all(0 <= share <= 1 for share in shares[name])
    assert shares["last"] != shares["official"]
