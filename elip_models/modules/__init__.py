"""What the models share: text towers and losses."""
