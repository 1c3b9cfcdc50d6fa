"""Make the cases `albef_pretrain` and `blip_pretrain`: a step of the official pre-training.

transformers 4.36.2 must come first on PYTHONPATH, because the official files import parts of it
that later versions lack.

Run: python -m tests.golden.make.pretraining CHECKOUT_OF_ELIP albef_pretrain
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from tests.golden.make.common import (
    draw_weights_,
    first_accurate_seed,
    gradients,
    ignore_documentation_decorator,
    package,
    randn,
    recorded_sorts,
    save,
    stage_tensors,
    stub,
    weights,
)

VIT = {"embed_dim": 16, "depth": 6, "num_heads": 2, "mlp_ratio": 2}
BERT = {
    "vocab_size": 96,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "encoder_width": 16,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
PRUNE = {"begin_layer": [1, 2, 4], "num_act_layers": [1, 2, 2], "keep_ratio": [0.9, 0.65, 0.4]}
KEEPS = [int(36 * ratio) for ratio in PRUNE["keep_ratio"]]
CONFIG = {
    **{"image": 48, "patch": 8, "batch": 4, "text_len": 10, "vit": VIT, "bert": BERT},
    **{"fusion_layer": 2, "embed_dim": 8, "queue_size": 10, "queue_ptr_start": 8},
    **{"momentum": 0.995, "temp": 0.07, "alpha": 0.4, "mlm_probability": 0.35, "prune": PRUNE},
}
ALBEF_IDS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
BLIP_IDS = {"pad": 0, "cls": 1, "sep": 2, "bos_dec": 4, "enc": 5}
MASK_SEED = 1234
QUEUES = ("image_queue", "text_queue", "queue_ptr")
FILES = {
    "albef_pretrain": [f"ALBEF/models/{name}.py" for name in ("model_pretrain", "vit", "xbert")],
    "blip_pretrain": [f"BLIP/models/{name}.py" for name in ("blip_pretrain", "vit", "med")],
}


def texts(seed):
    """Return token ids and mask of four texts with 6 to 10 tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, BERT["vocab_size"], (4, 10), generator=generator)
    ids[:, 0] = 1
    for row, length in zip(ids, (10, 8, 9, 6), strict=True):
        row[length - 1] = 2
        row[length:] = 0
    return ids, (ids != 0).long()


def from_scratch(cls, name, config, **options):
    """Replace `from_pretrained`: return a model with new weights."""
    return cls(config, **options)


def small_tower(vision_transformer, prune_state=None):
    """Return the official image tower with the sizes of `CONFIG`."""
    return vision_transformer(
        img_size=CONFIG["image"], patch_size=CONFIG["patch"], **VIT, prune_state=prune_state
    )


def build_albef(root):
    """Return the official ALBEF, and a function that runs its step."""
    ignore_documentation_decorator()
    module = importlib.import_module("models.model_pretrain")
    tower = module.VisionTransformer
    config = module.BertConfig(**BERT, fusion_layer=CONFIG["fusion_layer"])
    settings = {key: CONFIG[key] for key in ("mlm_probability", "embed_dim", "temp")}
    settings |= {"image_res": 96, "img_prune": PRUNE, "vision_width": 16, "bert_config": None}
    settings |= {"queue_size": CONFIG["queue_size"], "momentum": CONFIG["momentum"]}
    tokenizer = SimpleNamespace(pad_token_id=0, cls_token_id=1, mask_token_id=3)
    vit = lambda prune_state=None, **sizes: small_tower(tower, prune_state)  # noqa: E731
    with (
        mock.patch.object(module, "VisionTransformer", vit),
        mock.patch.object(module.BertConfig, "from_json_file", lambda path: config),
        mock.patch.object(module.BertForMaskedLM, "from_pretrained", classmethod(from_scratch)),
    ):
        model = module.ALBEF(tokenizer=tokenizer, config=settings, init_deit=False)

    def run(image, ids, mask):
        text = SimpleNamespace(input_ids=ids, attention_mask=mask)
        return dict(zip(("mlm", "ita", "itm"), model(image, text, CONFIG["alpha"]), strict=True))

    return model, run


class GivenTexts:
    """Replacement of BLIP's tokenizer that returns given ids."""

    pad_token_id = BLIP_IDS["pad"]
    bos_token_id = BLIP_IDS["bos_dec"]
    enc_token_id = BLIP_IDS["enc"]

    def __len__(self):
        return BERT["vocab_size"]

    def __call__(self, text, **options):
        return text

    def use(self, ids, mask):
        """Return texts that the model can move to a device."""
        text = SimpleNamespace(input_ids=ids, attention_mask=mask)
        text.to = lambda device: text
        return text


def build_blip(root):
    """Return the official BLIP, and a function that runs its step."""
    module = importlib.import_module("models.blip_pretrain")
    tower = importlib.import_module("models.vit").VisionTransformer
    store = torch.distributed.HashStore()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    stages = PRUNE | {"num_keep_tokens": KEEPS}
    tokenizer = GivenTexts()

    def create_vit(vit, image_size, grad_ckpt=False, ckpt_layer=0, drop_path=0, img_prune=None):
        return small_tower(tower, img_prune), VIT["embed_dim"]

    def config(path):
        return module.BertConfig(**BERT, add_cross_attention=True)

    with (
        mock.patch.multiple(module, create_vit=create_vit, init_tokenizer=lambda: tokenizer),
        mock.patch.object(module.BertConfig, "from_json_file", config),
        mock.patch.object(module.BertModel, "from_pretrained", classmethod(from_scratch)),
        mock.patch.object(module.BertLMHeadModel, "from_pretrained", classmethod(from_scratch)),
    ):
        sizes = {key: CONFIG[key] for key in ("embed_dim", "queue_size", "momentum")}
        model = module.BLIP_Pretrain(vit="small", **sizes, img_prune=stages)

    def run(image, ids, mask):
        losses = model(image, tokenizer.use(ids, mask), CONFIG["alpha"])
        return dict(zip(("ita", "itm", "lm"), losses, strict=True))

    return model, run


BUILD = {"albef_pretrain": build_albef, "blip_pretrain": build_blip}


def aliases(model):
    """Return the second names of tied parameters, with the names under which they are stored."""
    first, second = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = first.setdefault(id(tensor), name)
        if stored != name:
            second[name] = stored
    return second


def draw_(model, seed):
    """Draw the weights and the queues; the temperature stays as it is."""
    temperature = model.temp.detach().clone()
    draw_weights_(model, seed)
    model.temp.data.copy_(temperature)
    for k, queue in enumerate((model.image_queue, model.text_queue)):
        values = randn(*queue.shape, seed=seed + 4000 + k)
        queue.copy_(torch.nn.functional.normalize(values, dim=0))
    model.queue_ptr.fill_(CONFIG["queue_ptr_start"])


def record(case, root, seed, dtype=torch.float32):
    """Run one official training step, and return the tensors and the margins.

    The hard negatives are the most likely ones instead of random ones.
    """
    model, run = BUILD[case](root)
    model.train()
    draw_(model, seed)
    tensors = {k: t for k, t in weights(model).items() if not k.endswith("position_ids")}
    model.to(dtype)
    image = randn(4, 3, CONFIG["image"], CONFIG["image"], seed=seed + 1000).to(dtype)
    ids, mask = texts(seed + 2000)
    negatives, masked, embeds = [], [], []

    def most_likely(chances, count):
        negatives.append(chances.argmax(-1, keepdim=True))
        return negatives[-1]

    if case == "albef_pretrain":
        official_mask = model.mask

        def recorded_mask(*args, **kwargs):
            masked.extend(official_mask(*args, **kwargs))
            return masked

        model.mask = recorded_mask
    model.visual_encoder.register_forward_hook(lambda module, args, out: embeds.append(out))
    torch.manual_seed(MASK_SEED)
    with mock.patch.object(torch, "multinomial", most_likely), recorded_sorts() as sorts:
        losses = run(image, ids, mask)
    sum(losses.values()).backward()
    tensors |= {"image": image, "input_ids": ids, "attention_mask": mask}
    tensors |= {f"loss_{name}": loss for name, loss in losses.items()}
    tensors |= dict(zip(("mlm_input_ids", "mlm_labels"), masked, strict=False))
    negatives = torch.cat(negatives)
    tensors |= {"neg_image_idx": negatives[:4], "neg_text_idx": negatives[4:]}
    tensors["image_embeds"] = embeds[0]
    tensors |= {f"after/{name}": model.get_buffer(name) for name in QUEUES}
    _, margins = stage_tensors(sorts, KEEPS)
    return tensors | gradients(model), margins


def main(root, case):
    """Make one case."""
    torch.set_num_threads(1)
    stub("fairscale.nn.checkpoint.checkpoint_activations", checkpoint_wrapper=None)
    package("models", Path(root) / Path(FILES[case][0]).parent)
    tensors, facts = first_accurate_seed(record, case, root)
    model, _ = BUILD[case](root)
    ids = ALBEF_IDS if case == "albef_pretrain" else BLIP_IDS
    config = CONFIG | {"special_ids": ids}
    facts["aliases"] = aliases(model)
    save(case, tensors, source="ELIP", root=root, files=FILES[case], config=config, **facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
