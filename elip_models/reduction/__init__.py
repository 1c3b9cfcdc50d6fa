"""Token reduction: schedules, strategies, the forward pass of a reduced tower, and `reduce_`."""
