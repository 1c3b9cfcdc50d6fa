"""The checks that each family of multimodal language models has to pass, and their gaps."""

from tests.vlm.configs import GLM

CHECKS = {
    "every token": ("families", "keeping_every_token_changes_nothing"),
    "logits": ("families", "logits_are_those_of_the_model_without_removed_columns"),
    "gradients": ("training", "loss_and_gradients_are_those_of_the_model_without_removed_columns"),
    "generate": ("generation", "generate_continues_a_generation"),
    "beams": ("generation", "ways_to_generate"),
    "no cache": ("generation", "ways_to_generate"),
    "second turn": ("generation", "a_second_turn_with_the_cache_of_the_first"),
    "embeddings": ("generation", "embeddings_in_place_of_ids"),
}
"""The file and the test of each check; `test_cross_attention` has those of Mllama."""
GAPS: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        (("beams", name) for name in GLM),
        "generate of transformers mixes up the images of a row with several",
    ),
    ("beams", "llama4"): "generate of transformers does not repeat the images for the beams",
    ("no cache", "ernie4_5_vl_moe"): "generate of transformers does not extend the types of tokens",
    ("embeddings", "llama4"): "its stock model takes no pixels beside embeddings",
}
"""Why the model of transformers itself fails in a check, by check and `config.model_type`."""
