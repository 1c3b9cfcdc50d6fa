"""Analysis of a reduction: pictures of what it keeps, and agreement of the scorers."""

from elip_models.validation import require_packages

require_packages("elip_models.analysis", "PIL")
