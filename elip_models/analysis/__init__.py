"""What a reduction keeps, in pictures and shares."""

from elip_models.validation import require_packages

require_packages("elip_models.analysis", "PIL")
