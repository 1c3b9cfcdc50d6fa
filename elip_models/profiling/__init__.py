"""What a reduction costs and gains."""

from elip_models.validation import needs

needs("elip_models.profiling", "rich")
