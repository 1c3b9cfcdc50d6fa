"""Commands of `elip`: one module for each command or group of commands."""
