"""Fewer image tokens in vLLM, as a plugin that vLLM loads by itself.

`plugin` registers, `checks` notices settings, and `reduced_config` obeys or refuses them.
`settings` makes a strategy of them; `tokens`, `patches` and `positions` have the arithmetic in
plain torch. `processing` and `models` connect both with vLLM, and `patch_models` for `dedup`.
"""
