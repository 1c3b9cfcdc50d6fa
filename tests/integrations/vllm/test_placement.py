"""Settings in `--hf-overrides` that vLLM would accept and ignore."""

import pytest

from elip_models.integrations.vllm.placement import check_placement
from elip_models.validation import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"elips": {"keep": 0.25}}, "elips: expected no key like 'elip' at the top .* mean 'elip'"),
        ({"ELIP": None}, "ELIP: .* did you mean 'elip'"),
        (
            {"keep": 0.25},
            """keep: expected it inside 'elip', got it at the top .*'{"elip": {"keep": 0.25}}'""",
        ),
        ({"strategy": "pool"}, """strategy: expected it inside 'elip', .*{"strategy": "pool"}"""),
        ({"options": {"keep": 0.25}}, "keep: expected it inside 'elip', got it inside 'options'"),
        (
            {"text_config": {"elip": {"keep": 0.5}}},
            """elip: expected it at the top .* inside 'text_config'; .*'{"elip": {"keep": 0.5}}'""",
        ),
        ({"text_config": {"elip": None}}, """elip: .* pass .*{"elip": {"keep": 0.25}}"""),
        ({"text_config": {"elp": {}}}, "elp: expected no key like 'elip' inside 'text_config'"),
    ],
)
def test_misspelt_and_misplaced_settings_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_placement(overrides)


def test_keys_of_vllm_and_settings_in_their_place_are_accepted():
    groups = {"weights": {"strategy": "group"}}
    check_placement({"elip": {"keep": 0.25}, "text_config": {"rope_theta": 1e4}})
    check_placement({"clip_qkv": 8.0, "quantization_config": {"config_groups": groups}})
    check_placement({"elip": None, "architectures": ["LlavaForConditionalGeneration"]})
