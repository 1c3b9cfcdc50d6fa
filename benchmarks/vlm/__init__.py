"""A small LLaVA on generated questions: what fewer image tokens cost a language model."""
