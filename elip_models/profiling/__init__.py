"""What a reduction costs and gains."""

from elip_models.validation import require_packages

require_packages("elip_models.profiling", "rich")
