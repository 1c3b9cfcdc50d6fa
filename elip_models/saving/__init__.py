"""Open, save and load models, on disk and on the hub."""
