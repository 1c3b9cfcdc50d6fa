"""Arguments of each public function: some that pass, and of each argument what is refused."""

import tempfile
from functools import partial

import timm
import torch
from transformers import BlipVisionConfig, BlipVisionModel

import elip_kernels
import elip_models
from elip_kernels._example import EXAMPLES
from elip_models.integrations.peft.adapt_config import AdaptConfig
from tests.helpers import embed_arguments, selection_arguments
from tests.helpers.refused_values import good_arguments, refused_values
from tests.helpers.towers import SCHEDULE, WIDTH, images, plain_vit, text
from tests.pretraining.models.test_saving import CONFIG, pair

B, N, D, H = 2, 10, 8, 2
META = {"device": "meta"}


def good_received():
    return {"q": torch.randn(B, 4, 7, 4), "k": torch.randn(B, 2, N, 4)}


def good_unmerge():
    tokens, metric = torch.randn(2, 13, 6), torch.randn(2, 13, 8)
    merged, _, info = elip_kernels.bipartite_merge(tokens, metric, 4, return_info=True)
    return {"merged": merged, "info": info}


def good_merge_by():
    return {"tokens": torch.randn(2, 13, 6), "info": good_unmerge()["info"]}


def good_encode():
    return {"model": plain_vit(), "images": images(), "text_cls": text(), "schedule": SCHEDULE}


def good_patch():
    return {"model": plain_vit(), "schedule": SCHEDULE}


def good_guidance():
    return {"model": elip_models.reduce_(**good_patch()), "text_cls": text()}


def good_save():
    model = elip_models.reduce_(pair(), schedule=SCHEDULE)
    return {"model": model, "folder": tempfile.mkdtemp(), "config": CONFIG}


def good_load():
    return {"folder": elip_models.save_reduced(**good_save())}


matrix = [
    None,
    torch.randn(D),
    torch.randn(D, D + 1),
    torch.ones(D, D).long(),
    torch.randn(D, D, **META),
]
vector = [3.0, torch.randn(1, D), torch.randn(D + 1), torch.ones(D).long(), torch.randn(D, **META)]
flag = [1, None, "yes"]
mask = [
    *([True] * N, torch.ones(B, N), torch.ones(B, N - 1).bool()),
    torch.ones(B, N, **META).bool(),
]


BAD_KEPT = [(4,), (B, 0), (B, N), (3, 4)]


def metric(N):
    """What (B, N, C) features are not."""
    wrong = [None, torch.randn(B, N), torch.randn(B, N - 1, 8), torch.ones(B, N, 8).long()]
    return [*wrong, torch.randn(B, N, 8, **META)]


def size(N):
    """What (B, N) sizes are not."""
    wrong = [[1.0] * N, torch.ones(N), torch.ones(B, N - 1), torch.ones(B, N, 2)]
    wrong += [torch.ones(B, N).bfloat16(), torch.ones(B, N).long(), torch.ones(B, N, **META)]
    return wrong


absorbed = {
    "tokens": [
        *(None, torch.randn(N, D), torch.ones(B, N, D).long()),
        *(torch.randn(B, 0, D), torch.randn(B, N, 0)),
    ],
    "cls": [None, torch.randn(D), torch.randn(B, D + 1), torch.randn(B, D, **META)],
    "norm_weight": vector,
    "norm_bias": vector,
    "eps": [None, 1, -1e-6, float("nan")],
    "q_weight": matrix,
    "q_bias": vector,
    "k_weight": matrix,
    "num_heads": [None, True, 0, 3, 2.0],
    "scale": ["small", True],
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

EVERY_OP = {
    example.function: (partial(good_arguments, name), refused_values(name))
    for name, example in EXAMPLES.items()
}
"""The ops below have values of their own."""
OTHERS = EVERY_OP | selection_arguments.TABLE | embed_arguments.TABLE
TABLE = OTHERS | {
    elip_kernels.use_pytorch_ops: (dict, {}),
    elip_kernels.reduce: (
        partial(good_arguments, "reduce"),
        {
            "tokens": [
                *(None, [[1.0]], torch.randn(N, D), torch.ones(B, N, D).long()),
                *(torch.randn(B, N, 0), torch.randn(B, 0, D)),
            ],
            "attn": [
                *(None, torch.rand(B), torch.rand(B, N + 1), torch.rand(B, H, N - 1)),
                *(torch.rand(B, H, N, N - 1), torch.ones(B, N).long(), torch.rand(B, N, **META)),
            ],
            "keep": [None, True, "4", 0, -1, N, 0.0, 1.5, float("nan")],
            "merge": flag,
            "normalize": flag,
            "mask": mask,
            "num_prefix_tokens": [None, True, 1.0, -1, N],
            "return_info": flag,
        },
    ),
    elip_kernels.cls_attention: (
        partial(good_arguments, "cls_attention"),
        {
            "q": [
                *(None, torch.randn(B, 4), torch.ones(B, H, 4).long()),
                *(torch.randn(B, 0, 4), torch.randn(B, H, 0)),
            ],
            "k": [
                *(None, torch.randn(B, N, 4), torch.randn(B, H, N, 5), torch.randn(B, 3, N, 4)),
                *(torch.randn(B, H, N, 4).double(), torch.randn(B, H, N, 4, **META)),
                *(torch.randn(B, 0, N, 4), torch.randn(B, 2 * H, N, 4)),
            ],
            "scale": ["small", True],
            "mask": mask,
        },
    ),
    elip_kernels.attention_column_mean: (
        good_received,
        {
            "q": [
                *(None, torch.randn(B, 4, 4), torch.ones(B, 4, 7, 4).long()),
                *(torch.randn(B, 0, 7, 4), torch.randn(B, 4, 0, 4), torch.randn(B, 4, 7, 0)),
            ],
            "k": [
                *(None, torch.randn(B, N, 4), torch.randn(B, 2, N, 5), torch.randn(3, 2, N, 4)),
                *(torch.randn(B, 2, N, 4).double(), torch.randn(B, 2, N, 4, **META)),
                *(torch.randn(B, 0, N, 4), torch.randn(B, 3, N, 4)),
            ],
            "scale": ["small", True],
            "mask": mask,
            "query_mask": [torch.ones(B, 7), torch.ones(B, N).bool(), [True] * 7],
        },
    ),
    elip_kernels.cls_attention_from_tokens: (
        partial(good_arguments, "cls_attention_from_tokens"),
        absorbed,
    ),
    elip_kernels.bipartite_merge: (
        lambda: {"tokens": torch.randn(2, 13, 6), "metric": torch.randn(2, 13, 8), "r": 4},
        {
            "tokens": [None, [[1.0]], torch.randn(13, 6), torch.ones(2, 13, 6).long()],
            "metric": metric(13),
            "r": [None, True, 2.0, "4", -1],
            "size": size(13),
            "penalty": [
                *([1.0] * 13, torch.ones(13), torch.ones(2, 12), torch.ones(2, 13, 1)),
                *(torch.ones(2, 13).bool(), torch.ones(2, 13).half()),
                torch.ones(2, 13, **META),
            ],
            "lengths": selection_arguments.counts(13),
            "merges": [*selection_arguments.counts(13), torch.tensor([4, 4])],
            "num_prefix_tokens": [None, True, 1.0, -1, 99],
            "return_info": [1, None, "yes"],
        },
    ),
    elip_kernels.fuse_text: (
        lambda: {"tokens": torch.randn(B, N, D), "text": torch.randn(B, D), "fusion": 0.8},
        {
            "tokens": absorbed["tokens"],
            "text": [1.0, torch.randn(3, D), torch.randn(D), torch.randn(B, D, **META)],
            "fusion": [None, True, "0.5", -0.1, 1.1],
            "guidance_norm": [None, 1, "l2"],
        },
    ),
    elip_kernels.select_tokens: (
        lambda: {"attn": torch.rand(B, N), "keep": 4},
        {
            "attn": [None, torch.rand(B), torch.rand(B, H, N, N - 1), torch.ones(B, N).long()],
            "keep": [None, True, "4", 0, -1, N, 0.0, 1.5],
            "mask": mask,
            "num_prefix_tokens": [None, True, 1.0, -1, N],
        },
    ),
    elip_kernels.merge_nearest: (
        partial(good_arguments, "merge_nearest"),
        {
            "tokens": [None, [[1.0]], torch.randn(N, D), torch.ones(B, N, D).long()],
            "kept": [None, torch.rand(B, 4), *(torch.ones(shape).long() for shape in BAD_KEPT)],
            "metric": metric(N),
            "size": size(N),
            "mask": mask,
            "num_prefix_tokens": [None, True, 1.0, -1, N],
            "return_info": flag,
        },
    ),
    elip_kernels.unmerge: (
        good_unmerge,
        {
            "merged": [None, torch.randn(9, 6), torch.randn(2, 8, 6)],
            "info": [None, 4, torch.ones(2, 9, 13), torch.ones(9, 13).bool()],
        },
    ),
    elip_kernels.apply_merge: (
        good_merge_by,
        {
            "tokens": [
                *(None, torch.randn(13, 6), torch.randn(2, 12, 6), torch.randn(3, 13, 6)),
                *(torch.ones(2, 13, 6).long(), torch.randn(2, 13, 6, **META)),
            ],
            "info": [None, torch.zeros(2, 13)],
            "size": [[1.0] * 13, torch.ones(2, 12), torch.ones(2, 13).long()],
        },
    ),
    elip_kernels.score_reduce: (
        partial(good_arguments, "score_reduce"),
        absorbed
        | dict.fromkeys(["merge", "normalize", "return_info"], flag)
        | {"keep": [None, True, "4", 0, N - 1, 0.0, 1.0]}
        | {"fusion": [None, True, "0.5", -0.1, 1.1], "guidance_norm": [None, 1, "l2"]}
        | {"text": [1.0, torch.randn(3, D), torch.randn(D), torch.ones(B, D).long()]}
        | {"scored": [1, torch.randn(B, N, D + 1), torch.randn(B, N, D, **META)]}
        | {"row": [1, torch.rand(B, N).double(), torch.rand(B, N - 1), torch.rand(B, N, **META)]},
    ),
    elip_kernels.cls_attention_output: (
        partial(good_arguments, "cls_attention_output"),
        absorbed | {"v_weight": matrix, "v_bias": vector},
    ),
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
            "return_info": flag,
        },
    ),
    elip_models.reduce_: (
        good_patch,
        settings | {"model": models},
    ),
    elip_models.unreduce_: (good_patch, {"model": [None, "vit"]}),
    elip_models.use_sdpa_: (
        lambda: {"model": BlipVisionModel(BlipVisionConfig(num_hidden_layers=1))},
        {"model": [None, "vit", plain_vit()], "enabled": flag},
    ),
    elip_models.guidance: (
        good_guidance,
        {"model": [None, plain_vit()], "text_cls": [None, *text_cls[:3]]},
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
        | dict.fromkeys(("class_token_only", "every", "time"), flag)
        | {
            "tolerance": [None, 0, -1, "0.1", 1.5],
            "metric": ["cosin", None, 3, lambda *_: 0.1, lambda *_: torch.full((8,), torch.nan)],
            "strategies": ["tome", [3]],
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
        {"spec": [None, 3, "nope", "timm:nope"], "pretrained": [1, None]},
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
