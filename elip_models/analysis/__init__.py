"""What a reduction keeps, in pictures and shares."""

from elip_models.validation import needs

needs("elip_models.analysis", "PIL")
