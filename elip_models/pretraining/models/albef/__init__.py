"""ALBEF: pre-training, retrieval, VQA, entailment and NLVR2."""
