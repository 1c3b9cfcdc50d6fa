"""Hostile inputs of every kind, by a seed: python -m tests.fuzz --count 3000 --seed 1"""
