"""What the plugin does in vLLM with settings and without them, with stubs in place of vLLM."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest

from elip_models.integrations.vllm.families import FAMILIES
from elip_models.integrations.vllm.seams import SEAMS

PACKAGE = "elip_models.integrations.vllm"
OTHER, LLAVA = "LlamaForCausalLM", "LlavaForConditionalGeneration"


class Stock:
    """vLLM's class with the checks of an architecture, which changes its arguments."""

    @classmethod
    def verify_and_update_model_config(cls, model_config):
        model_config.seen = [*getattr(model_config, "seen", ()), "model"]

    @classmethod
    def verify_and_update_config(cls, vllm_config):
        vllm_config.model_config.seen.append("all")


class Registry(dict):
    """vLLM's table of models."""

    register_model = dict.__setitem__
    get_supported_archs = dict.keys


def add_names(monkeypatch, names):
    """Add stubs of modules, with their values."""
    for path, values in names.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                if end > 1:
                    setattr(sys.modules[name.rpartition(".")[0]], parts[end - 1], sys.modules[name])
        vars(sys.modules[path]).update(values)


@pytest.fixture
def vllm(monkeypatch):
    """A vLLM with what notices settings, but without the names that a reduced model needs."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("plugin", "checks", "reduced_config", "settings"):
        monkeypatch.delitem(sys.modules, f"{PACKAGE}.{name}", raising=False)
    messages = []
    log = SimpleNamespace(
        **dict.fromkeys(
            ("info", "warning", "error"), lambda text, *args: messages.append(text % args)
        )
    )
    registry = Registry.fromkeys([OTHER, *FAMILIES], "stock")
    names = {
        "vllm": {"__version__": "0.99.0", "ModelRegistry": registry},
        "vllm.logger": {"init_logger": lambda name: log},
        "vllm.model_executor.models.config": {
            "MODELS_CONFIG_MAP": {LLAVA: Stock},
            "VerifyAndUpdateConfig": Stock,
        },
    }
    add_names(monkeypatch, names)
    yield SimpleNamespace(
        registry=registry,
        configs=sys.modules["vllm.model_executor.models.config"],
        messages=messages,
        register=lambda: import_module(f"{PACKAGE}.plugin").register(),
    )
    for name in ("plugin", "checks", "reduced_config", "models", "processing"):
        sys.modules.pop(f"{PACKAGE}.{name}", None)


def model_of(architecture, settings=None, **overrides):
    config = SimpleNamespace(
        elip=settings,
        architectures=[architecture],
        vision_config=SimpleNamespace(model_type="clip"),
    )
    return SimpleNamespace(
        hf_config=config,
        hf_overrides=overrides,
        architecture=architecture,
        get_model_arch_config=lambda: tuple(config.architectures),
    )


def start(vllm, model):
    """Check a model as vLLM does when it starts."""
    vllm.register()
    checks = vllm.configs.MODELS_CONFIG_MAP.get(model.architecture, None)
    checks.verify_and_update_model_config(model)
    checks.verify_and_update_config(SimpleNamespace(model_config=model))


def test_an_installed_package_replaces_no_model_and_imports_no_strategy(vllm):
    stock = vllm.configs.MODELS_CONFIG_MAP
    for _ in range(2):  # vLLM may load a plugin twice
        vllm.register()
    assert {name for name, model in vllm.registry.items() if model == "stock"} == {OTHER, *FAMILIES}
    assert stock == {LLAVA: Stock} and vllm.configs.MODELS_CONFIG_MAP.data is stock
    assert vllm.configs.MODELS_CONFIG_MAP.get("an alias of vLLM", None) is None
    assert f"{PACKAGE}.settings" not in sys.modules and not vllm.messages


@pytest.mark.parametrize("name", [OTHER, LLAVA])
def test_a_model_without_settings_is_checked_by_vllm_alone(name, vllm):
    model = model_of(name)
    start(vllm, model)
    assert model.seen == ["model", "all"] and not vllm.messages
    assert model.hf_config.architectures == [name]
    assert f"{PACKAGE}.settings" not in sys.modules


def test_entries_that_others_add_are_used(vllm):
    stock = vllm.configs.MODELS_CONFIG_MAP
    vllm.register()
    stock[OTHER] = type("Other", (Stock,), {})
    assert issubclass(vllm.configs.MODELS_CONFIG_MAP.get(OTHER), stock[OTHER])


def test_settings_of_a_model_without_a_family_are_refused(vllm):
    with pytest.raises(ValueError, match=f"model: expected one of .* got {OTHER}"):
        start(vllm, model_of(OTHER, {"keep": 0.5}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_of(LLAVA, {"keep": 0}), "elip: keep: expected"),
        (model_of(LLAVA, {}, elip={}), "vllm: expected a version with"),
        (model_of(OTHER, elips={"keep": 0.5}), "elips: expected no key like 'elip'"),
    ],
)
def test_settings_are_obeyed_or_the_model_does_not_start(model, message, vllm):
    with pytest.raises(ValueError, match=message):
        start(vllm, model)


def test_a_name_that_vllm_lacks_is_an_error_with_settings_alone(vllm, monkeypatch):
    needed = [name.split(":") for name in (*SEAMS, *FAMILIES[LLAVA].seams)]
    *rest, (path, processor) = needed[:-1]
    for module, name in rest:
        owner, _, method = name.partition(".")
        stub = getattr(sys.modules.get(module), owner, SimpleNamespace())
        setattr(stub, method or "_", None)
        add_names(monkeypatch, {module: {owner: stub}})
    add_names(monkeypatch, {path: {needed[-1][1]: None}})
    start(vllm, model_of(LLAVA))
    settings = {"keep": 0.5}
    with pytest.raises(ValueError, match=f"a version with {path}:{processor} .* 0.99.0; install"):
        start(vllm, model_of(LLAVA, settings))
    add_names(monkeypatch, {path: {processor: None}})
    model = model_of(LLAVA, settings)
    vllm.register()
    vllm.configs.MODELS_CONFIG_MAP.get(LLAVA).verify_and_update_model_config(model)
    assert model.hf_config.architectures == [f"Reduced{LLAVA}"] == list(model.model_arch_config)
    assert vllm.registry[f"Reduced{LLAVA}"] == f"{PACKAGE}.models:{LLAVA}"
    assert vllm.messages == ["elip-kernels is tested with vLLM 0.32, got 0.99.0"]


def test_a_vllm_without_the_hooks_starts_and_logs_an_error(vllm):
    del vllm.configs.MODELS_CONFIG_MAP
    vllm.register()
    (message,) = vllm.messages
    assert "cannot read settings: vLLM 0.99.0 has no" in message and "MODELS_CONFIG_MAP" in message
