"""Tests of `elip_models.checkpoints`."""
