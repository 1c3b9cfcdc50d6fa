"""Arms of a recipe, trained or only reduced over the same seeds, and what sets them apart."""
