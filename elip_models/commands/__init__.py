"""What `elip` does: one module a command, or a group of them; each is a function of its options."""
