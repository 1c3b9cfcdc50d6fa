"""Text-guided vision token reduction for image-text models, and the models that train with it."""

from elip_models.reduction.encode import encode_image
from elip_models.reduction.patch import guidance, reduce_, unreduce_
from elip_models.reduction.schedule import Schedule

__all__ = ["Schedule", "encode_image", "guidance", "reduce_", "unreduce_"]
