"""BLIP: pre-training, retrieval, VQA, NLVR2 and captioning."""
