"""Tests of the language-image models."""
