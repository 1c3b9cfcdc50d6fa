"""Arguments of each public function: some that pass, and of each argument what is refused."""

import tempfile
from inspect import signature

import timm
import torch
from PIL import Image
from torch import Tensor

import elip_kernels
import elip_models
from elip_kernels._example import EXAMPLES, Sizes
from elip_models.integrations.peft.adapt_config import AdaptConfig
from tests.helpers.towers import SCHEDULE, WIDTH, images, plain_vit, text
from tests.pretraining.models.test_saving import CONFIG, pair
from tests.vlm.models import build

B, N, D, H = 2, 10, 8, 2
META = {"device": "meta"}
SIZES = Sizes(B=B, N=N, D=D, K=6, H=H, dtype=torch.float32)
BY_ANNOTATION = {
    Tensor: [None, [1.0], torch.tensor(1.0), torch.ones(2, 3, 4, 5, 6)],
    Tensor | None: ["yes", [1.0], torch.tensor(1.0), torch.ones(2, 3, 4, 5, 6)],
    bool: [1, None, "yes"],
    int: [None, True, "4", 1.5, -1],
    float: [None, True, "small"],
    int | float: [None, True, "4", 0, -1],
    float | None: [True, "small"],
    str: [None, 1, "no such name"],
}
"""Values that any op refuses for an argument of this annotation."""


def good_encode():
    return {"model": plain_vit(), "images": images(), "text_cls": text(), "schedule": SCHEDULE}


def good_patch():
    return {"model": plain_vit(), "schedule": SCHEDULE}


def reduced_llava():
    model = build("llava")[0]
    elip_models.reduce_(model, "elip", keep=0.7)
    return elip_models.reduce_(model, "diverse")


def good_guidance():
    mask = torch.ones(1, 3, dtype=torch.bool)
    return {"model": reduced_llava(), "text_cls": torch.randn(1, 32), "question": mask}


def good_save():
    model = elip_models.reduce_(pair(), schedule=SCHEDULE)
    return {"model": model, "folder": tempfile.mkdtemp(), "config": CONFIG}


def good_load():
    return {"folder": elip_models.save_reduced(**good_save())}


def good_embed():
    folder = tempfile.mkdtemp()
    Image.new("RGB", (32, 32)).save(f"{folder}/a.png")
    places = {"model": "timm:vit_tiny_patch16_224", "source": folder, "output": tempfile.mkdtemp()}
    return places | {"pretrained": False, "check": 0, "workers": 0, "keep": 0.7}


def but(*shape, dtype=torch.float32):
    """Tensors that an argument of this shape and dtype refuses."""
    good = torch.ones(shape, dtype=dtype)
    other = torch.int64 if good.is_floating_point() else torch.float32
    return [torch.cat([good, good], -1), good[0], good.to(other), good.to("meta")]


def op(name, **values):
    """An op: arguments that pass, and what is refused, by annotation or `values` of its own."""
    example = EXAMPLES[name]
    parameters = signature(example.function).parameters.values()
    refused = {p.name: BY_ANNOTATION.get(p.annotation, [None, "yes"]) for p in parameters}
    return lambda: example.arguments(SIZES), refused | values


tokens = [torch.randn(N, D), torch.ones(B, N, D).long(), torch.randn(B, N, 0), torch.randn(B, 0, D)]
matrix, vector, mask = but(D, D), but(D), but(B, N, dtype=torch.bool)
per_image = [[N, N], torch.tensor([N]), torch.tensor([N, N + 1]), torch.tensor([-1, N])]
number, prefix = [0, -1, N + 1, 0.0, 1.5, float("nan")], [True, -1, 99]
metric = [torch.randn(B, N), torch.randn(B, N - 1, 4), torch.ones(B, N, 4).long()]
fused = {"fusion": [True, "0.5", -0.1, 1.1], "guidance_norm": [1, "l2"]}
absorbed = {
    "tokens": tokens,
    "cls": but(B, D),
    **dict.fromkeys(("norm_weight", "norm_bias", "q_bias"), vector),
    **dict.fromkeys(("q_weight", "k_weight"), matrix),
    "eps": [None, 1, -1e-6, float("nan")],
    "num_heads": [None, True, 0, 3, 2.0],
}
OPS = {
    "reduce": {
        "tokens": tokens,
        "attn": [torch.rand(B, N + 1), torch.rand(B, H, N - 1), torch.ones(B, N).long()],
        "keep": number,
        "mask": mask,
        "num_prefix_tokens": prefix,
    },
    "cls_attention": {
        "q": [torch.randn(B, 4), torch.ones(B, H, 4).long(), torch.randn(B, 0, 4)],
        "k": [torch.randn(B, N, 4), torch.randn(B, H, N, 5), torch.randn(B, 2 * H, N, 4)],
        "mask": mask,
    },
    "attention_column_mean": {
        "q": [torch.randn(B, 4, 4), torch.ones(B, 4, N, 4).long(), torch.randn(B, H, 0, 4)],
        "k": [torch.randn(B, N, 4), torch.randn(B, H, N, 5), torch.randn(B, 3, N, 4)],
        **dict.fromkeys(("mask", "query_mask"), mask),
    },
    "cls_attention_from_tokens": absorbed,
    "cls_attention_output": absorbed | {"v_weight": matrix, "v_bias": vector},
    "score_reduce": absorbed
    | fused
    | {"keep": [True, "4", 0, N - 1, 0.0, 1.0], "text": but(3, D), "scored": but(B, N, D)}
    | {"row": [torch.rand(B, N).double(), torch.rand(B, N - 1), torch.rand(B, N, **META)]},
    "bipartite_merge": {
        "tokens": tokens[:2],
        "metric": metric,
        "r": [True, 2.0, -1],
        **dict.fromkeys(("size", "penalty"), but(B, N)),
        "lengths": per_image,
        "merges": per_image,
        "num_prefix_tokens": prefix,
    },
    "fuse_text": fused | {"tokens": tokens, "text": but(3, D)},
    "select_tokens": {
        "attn": [torch.rand(B), torch.rand(B, H, N, N - 1), torch.ones(B, N).long()],
        "keep": number,
        "mask": mask,
        "num_prefix_tokens": prefix,
    },
    "merge_nearest": {
        "tokens": tokens[:2],
        "kept": [torch.rand(B, 4), *(torch.ones(shape).long() for shape in [(4,), (B, 0), (3, 4)])],
        "metric": metric,
        "size": but(B, N),
        "mask": mask,
        "num_prefix_tokens": prefix,
    },
    "unmerge": {
        "merged": [torch.randn(6, 8), torch.randn(2, 8, 6)],
        "info": [4, torch.ones(2, 6, N), torch.ones(6, N).bool()],
    },
    "apply_merge": {
        "tokens": [torch.randn(N, D), torch.randn(B, N - 1, D), torch.ones(B, N, D).long()],
        "info": [None, torch.zeros(2, N)],
        "size": but(B, N),
    },
    "select_diverse": {
        "tokens": tokens,
        "keep": number,
        "mask": mask,
        "first": [
            torch.ones(B),
            torch.ones(B, 1).long(),
            torch.full((B,), N),
            torch.full((B,), -1),
        ],
    },
    "select_dpp": {"tokens": tokens, "keep": number, "mask": mask, "relevance": but(B, N)},
}
settings = {
    "keep": [0, -0.1, 1.1, "0.7", True, 0.01],
    "schedule": [12, "12 layers", "2(100%) 2(40%)", "2(40%) 4(60%)"],
    "strategy": ["tomee", 3, ["tome"]],
    "scorer": ["lats", True, 0, 3, 1.5, ["last"]],
    "fusion": ["0.8", True, -0.1, 1.1],
    "guidance_norm": ["l2", 2],
    "without_text": ["skip", 1],
    "merge": ["yes", 1, True],
    "proportional": ["yes", 1, True],
}
models = [
    None,
    "vit",
    torch.nn.Linear(3, 3),
    plain_vit(block_fn=timm.models.vision_transformer.ResPostBlock),
]
text_cls = [
    [0.0] * WIDTH,
    torch.randn(WIDTH),
    torch.randn(2, WIDTH + 1),
    torch.randn(2, WIDTH, **META),
]


def good_images():
    return {"model": plain_vit(), "images": torch.randn(8, 3, 48, 48)}


features = {
    "model": [None, "vit", torch.nn.Linear(3, 3)],
    "images": [None, torch.randn(3, 48), torch.ones(8, 3, 48, 48).byte()],
    "batch_size": [0, 2.0, None],
    "progress": [],
}

TABLE = {EXAMPLES[name].function: op(name, **OPS.get(name, {})) for name in EXAMPLES}
TABLE |= {
    elip_models.embed: (
        good_embed,
        {
            "model": [None, 3, "nope", "timm:nope"],
            "source": ["no/such/folder"],
            "output": [__file__],
            "reduce": [3, "tomee"],
            "keep": [0, 2, "half"],
            "progress": [],
            "report": [],
        },
    ),
    elip_kernels.use_pytorch_ops: (dict, {}),
    elip_kernels.export_custom_ops: (dict, {}),
    elip_models.encode_image: (
        good_encode,
        settings
        | {
            "model": models,
            "images": [
                *(None, torch.randn(3, 48, 48), torch.randn(2, 3, 32, 32)),
                *(torch.ones(2, 3, 48, 48).byte(), torch.randn(2, 3, 48, 48, **META)),
            ],
            "text_cls": text_cls,
            "return_info": [1, None],
        },
    ),
    elip_models.reduce_: (
        good_patch,
        settings | {"model": models},
    ),
    elip_models.unreduce_: (good_patch, {"model": [None, "vit"]}),
    elip_models.guidance: (
        good_guidance,
        {
            "model": [None, plain_vit()],
            "text_cls": text_cls[:3],
            "question": [3, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool)],
            "paired": [True, 1, None],
        },
    ),
    elip_models.budget: (
        lambda: {"model": reduced_llava(), "keep": 0.5},
        {"model": [None, plain_vit()], "keep": [None, 0, 1.5, "x", [0.5, "x"]], "total": [5]},
    ),
    elip_models.create_model: (
        lambda: {"name": "clip_tiny"},
        {
            "name": [None, "clip", "elip_clip_tniy"],
            "pretrained": [True, "no/such/folder", 3],
            "task": ["vqaa", "captioning", 3],
            "overrides": [
                *({"widht": 3}, {"vision_heads": 7}, {"schedule": "3(100%)"}, {"patch_size": 0}),
                *({"vision_width": "abc"}, {"temperature": 0}, {"temperature": -1}),
                *({"drop_path": 2.0}, {"embed_dim": 0}, {"eos_token_id": 5000}, {"gather": "no"}),
                *({"scorer": ["last"]}, {"merge": 1}, {"vision_heads": 0}, {"count_cls": 1}),
            ],
        },
    ),
    elip_models.calibrate: (
        lambda: good_images() | {"strategies": ["tome"], "tolerance": 0.5, "time": False},
        features
        | {name: [1, None] for name in ("class_token_only", "compile", "every", "time")}
        | {name: [-1, 0.5, None] for name in ("distill", "seed")}
        | {
            "tolerance": [None, 0, -1, "0.1", 1.5],
            "minutes": [None, -1, "5", torch.nan],
            "labels": [3, [0, 1], torch.zeros(8, dtype=torch.long), torch.arange(7)],
            "task": ["cosin", 3, lambda *_: 0.1, lambda *_: torch.full((4,), torch.nan)],
            "strategies": ["tome", [3]],
            "compare": ["tome 0.5", [3], ["tmoe"]],
            "names": ["a", ["a"]],
            "dtype": ["fp32"],
            "folder": [3],
            "metric": [],
            "announce": [],
            "save": [],
        },
    ),
    elip_models.distill: (
        lambda: good_images() | {"keep": 0.7, "steps": 1},
        features
        | {name: settings[name] for name in ("keep", "strategy")}
        | {"steps": [0, 1.5, None], "lr": [0, -1e-3, "small"], "seed": [-1, 0.5, None]}
        | {"lora_rank": [0, 1.5], "checkpoint": [3]},
    ),
    elip_models.list_models: (dict, {}),
    elip_models.list_strategies: (dict, {"model": ["vit", timm.create_model("resnet18")]}),
    elip_models.open_model: (
        lambda: {"spec": "clip_tiny", "pretrained": False},
        {"spec": [None, 3, "nope", "timm:nope"]}
        | {name: [1, None] for name in ("pretrained", "with_head")},
    ),
    elip_models.adapt_: (
        lambda: {
            "model": elip_models.create_model("clip_tiny"),
            "config": AdaptConfig(kind="lora"),
        },
        {"model": [None, "clip_tiny", plain_vit()], "config": [None, "lora"]},
    ),
    elip_models.save_reduced: (
        good_save,
        {
            "model": [None, "vit", plain_vit(), elip_models.reduce_(plain_vit(), strategy="tome")],
            "folder": [None, 3],
            "config": [None, 3, "ViT-X"],
        },
    ),
    elip_models.load_reduced: (
        good_load,
        {
            "folder": [None, 3, "no/such/folder", tempfile.mkdtemp()],
            "model": ["vit", 3],
            "strategy": [3, "tomee"],
        },
    ),
    elip_models.reduction_summary: (lambda: {"model": plain_vit()}, {"model": [None, "vit"]}),
    elip_models.is_reduced: (lambda: {"model": plain_vit()}, {"model": []}),
    elip_models.record_stages: (
        lambda: {"model": elip_models.reduce_(plain_vit(), schedule=SCHEDULE)},
        {"model": [None, "vit", plain_vit()]},
    ),
    elip_models.Schedule.parse: (
        lambda: {"text": SCHEDULE},
        {"text": [None, 12, "", "2(100)"], "count_cls": [None, 1]},
    ),
}
