"""Multimodal language models of transformers: fewer image tokens for the language model.

`families` finds the parts of a model, `strategies` select image tokens, `prompt_reduction` removes
the others from the sequence that the language model reads, and `install` connects them with it.
`elip_models.api` has the public functions.
"""
