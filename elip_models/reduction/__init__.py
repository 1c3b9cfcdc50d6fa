"""Token reduction: schedules, one stage, the loop over blocks, the patch for any model."""
