"""Tests of `elip_models.pretraining.checkpoints`."""
