"""Analysis of a reduction: features, ranking, and pictures of what it keeps."""

from elip_models.validation import require_packages

require_packages("elip_models.analysis", "PIL")
