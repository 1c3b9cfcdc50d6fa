"""Hostile weight files, model folders, embeddings, image sources, states and tars, by a seed.

python -m tests.fuzz --count 3000 --seed 1
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; ids name no real model
