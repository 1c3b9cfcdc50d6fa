"""Cost and gain of token reduction: FLOPs, time and memory."""

from elip_models.validation import require_packages

require_packages("elip_models.profiling", "rich")
