"""The language-image models of the paper, and any other by its name."""
