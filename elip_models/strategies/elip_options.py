"""The options of ELIP, which other guided strategies and configurations share."""

from typing import Literal, TypedDict

from elip_models.strategies.scorers import ScorerName
from elip_models.towers.merge import Merge
from elip_models.validation import Share


class ELIPOptions(TypedDict, total=False):
    """The options of ELIP beside its schedule, as keyword arguments.

    Attributes:
        scorer: where the attention row that selects comes from (`scorers.py`). 'last' (default)
            reads the stage's last layer and runs no layer twice. 'exact' is the paper's, 'official'
            its code's. 'bf16', 'alternate', 'attention', 'cls' and 'mean' approximate them. An int
            m runs m-1 layers and reads the m-th. 'received' scores a token by the attention that
            it receives, and needs neither CLS token nor text.
        fusion: lam of Eq. 1, 0.8 by default; 1 uses the image alone, 0 the text alone.
        guidance_norm: 'match' rescales the text to the norm of the image's CLS token; 'none'
            (default) does not.
        without_text: without a text, 'vision' reduces by the image alone, 'dense' reduces nothing.
            The default is 'vision', or 'dense' for a tower without CLS token.
        merge: 'one' (default) appends one token, merged from all that are dropped; 'nearest' merges
            each into the kept token with the most similar key; 'none' discards them.
        proportional: with merge='nearest', add log(size) of each key to the attention scores of
            the blocks that follow, as ToMe does. False by default.
    """

    scorer: ScorerName | None
    fusion: Share | None
    guidance_norm: Literal["none", "match"] | None
    without_text: Literal["dense", "vision"] | None
    merge: Merge | None
    proportional: bool | None
