"""Fewer image tokens in vLLM, as a plugin that vLLM loads by itself.

`settings` reads the strategy from a model's config, `tokens` and `positions` have the arithmetic in
plain torch, `processing` and `models` connect both with vLLM, and `plugin` registers them.
"""
