"""What the plugin does with models that it does not reduce, with stubs in place of vLLM."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from elip_models.integrations.vllm.families import FAMILIES

CHECKS = "elip_models.integrations.vllm.checks"
OTHER, LLAVA = "LlamaForCausalLM", "LlavaForConditionalGeneration"


class Stock:
    """vLLM's class with the checks of an architecture, which changes its arguments."""

    @classmethod
    def verify_and_update_model_config(cls, model_config):
        model_config.seen = [*getattr(model_config, "seen", ()), "model"]

    @classmethod
    def verify_and_update_config(cls, vllm_config):
        vllm_config.model_config.seen.append("all")


@pytest.fixture
def table(monkeypatch):
    """vLLM's table of checks, after the plugin has added its own."""
    table = {OTHER: Stock, LLAVA: Stock}
    modules = {
        "vllm.logger": {"init_logger": lambda name: SimpleNamespace(info=lambda *args: None)},
        "vllm.model_executor.models.config": {
            "MODELS_CONFIG_MAP": table,
            "VerifyAndUpdateConfig": Stock,
        },
    }
    for name, values in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        vars(sys.modules[name]).update(values)
    monkeypatch.delitem(sys.modules, CHECKS, raising=False)
    for _ in range(2):  # vLLM may load a plugin twice
        import_module(CHECKS).install_checks([OTHER, *FAMILIES])
    yield table
    sys.modules.pop(CHECKS)


@pytest.mark.parametrize("name", [OTHER, LLAVA])
def test_a_model_without_settings_is_checked_by_vllm_alone(name, table):
    model = SimpleNamespace(hf_config=SimpleNamespace(), architecture=name)
    table[name].verify_and_update_model_config(model)
    table[name].verify_and_update_config(SimpleNamespace(model_config=model))
    assert model.seen == ["model", "all"]
    assert table[name].__name__ == "Stock" and len(table[name].__mro__) == 4


def test_settings_of_a_model_without_a_family_are_refused(table):
    config = SimpleNamespace(elip={"keep": 0.5})
    model = SimpleNamespace(hf_config=config, architecture=OTHER)
    with pytest.raises(ValueError, match=f"model: expected one of .* got {OTHER}"):
        table[OTHER].verify_and_update_model_config(model)


def test_a_family_with_settings_is_checked(table):
    config = SimpleNamespace(elip={"keep": 0})
    model = SimpleNamespace(hf_config=config, architecture=LLAVA)
    with pytest.raises(ValueError, match="elip: keep: expected"):
        table[LLAVA].verify_and_update_model_config(model)
