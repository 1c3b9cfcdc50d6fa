"""What a reduction costs and gains."""

from elip_models.extras import needs

needs("elip_models.profiling", "rich")
