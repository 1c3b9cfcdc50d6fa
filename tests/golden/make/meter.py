"""Make the case `meter_mlm_itm`: a step of METER's official pre-training.

transformers 4.36.2 must come first on PYTHONPATH, because the official files import parts of it
that later versions lack.

Run: python -m tests.golden.make.meter CHECKOUT_OF_ELIP
"""

import importlib
import sys
from pathlib import Path
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
    use_plain_layer_norm_,
    weights,
)
from tests.golden.make.pretraining import ALBEF_IDS, BERT, from_scratch, texts

WIDTH = 16
TEXT_BERT = BERT | {"num_hidden_layers": 2}
VIT = {"width": WIDTH, "layers_arg": 6, "blocks": 5, "heads": 2, "mlp_ratio": 4}
CROSS = {"num_top_layer": 2, "hidden": WIDTH, "heads": 2, "intermediate": 2 * WIDTH}
PRUNE = {"begin_layer": [1, 2, 3], "num_act_layers": [1, 2, 2], "keep_ratio": [0.9, 0.7, 0.45]}
KEEPS = [int(36 * ratio) for ratio in PRUNE["keep_ratio"]]
CONFIG = {
    **{"image": 48, "patch": 8, "batch": 4, "text_len": 10, "vit": VIT, "text_bert": TEXT_BERT},
    **{"cross": CROSS, "prune": PRUNE, "special_ids": ALBEF_IDS},
}
MODULES = "METER/meter/modules"
FILES = [f"{MODULES}/{n}.py" for n in ("meter_module", "clip_model_vl_pruning", "bert_model")]
FILES += [f"{MODULES}/{n}.py" for n in ("heads", "objectives")]
LABEL_SEED = 4321
LOSSES = {"mlm": 1, "itm": 1, "vqa": 0, "nlvr2": 0, "snli": 0, "irtr": 0}


class LightningStandIn(torch.nn.Module):
    """The parts of `pytorch_lightning.LightningModule` that the official model uses."""

    device = torch.device("cpu")

    def save_hyperparameters(self):
        """Store the argument `config` of the caller, as Lightning does."""
        self.hparams = mock.Mock(config=sys._getframe(1).f_locals["config"])

    def log(self, name, value):
        """Ignore a logged value."""


def official_module(root):
    """Import the official model with stand-ins for what a step does not need."""
    ignore_documentation_decorator()
    stub("pytorch_lightning", LightningModule=LightningStandIn)
    package("meter", Path(root) / "METER/meter")
    package("meter.modules", Path(root) / MODULES)
    metric = mock.Mock(side_effect=lambda: mock.Mock(return_value=0.0))
    stub("meter.gadgets")
    stub("meter.gadgets.my_metrics", Accuracy=metric, VQAScore=metric, Scalar=metric)
    stub("meter.modules.swin_transformer")
    stub("meter.modules.swin_helpers", swin_adapt_position_encoding=None)
    return importlib.import_module("meter.modules.meter_module")


def build(root):
    """Return the official METER with the sizes of `CONFIG`."""
    module = official_module(root)
    clip = importlib.import_module("meter.modules.clip_model_vl_pruning")

    def build_model(name, resolution_after, prune_state):
        model = clip.CLIP(
            *(WIDTH, 48, VIT["layers_arg"], 64, 8, 10, 96, WIDTH, 1, 1),
            resolution_after,
            prune_state,
        )
        model.visual = clip.VisualTransformer(
            *(48, 8, WIDTH, VIT["layers_arg"], VIT["heads"], WIDTH, 48), prune_state
        )
        return model

    bert = module.BertConfig(**TEXT_BERT)
    config = {
        **{"vit": "clip", "tokenizer": "bert", "vocab_size": 96, "hidden_size": WIDTH},
        **{"num_layers": 2, "num_heads": CROSS["heads"], "mlp_ratio": 2, "max_text_len": 16},
        **{"drop_rate": 0.0, "image_size": 48, "input_text_embed_size": WIDTH, "load_path": ""},
        **{"input_image_embed_size": WIDTH, "resolution_before": 192, "img_prune": PRUNE},
        **{"num_top_layer": CROSS["num_top_layer"], "loss_names": LOSSES, "test_only": False},
    }
    new_bert = classmethod(lambda cls, name: from_scratch(cls, name, bert))
    with (
        mock.patch.object(module, "build_model", build_model),
        mock.patch.object(module.BertModel, "from_pretrained", new_bert),
    ):
        model = module.METERTransformerSS(config)
    model.current_tasks = ["mlm", "itm"]
    return model


def masked(ids, seed):
    """Return ids with about a third of the words masked, and the labels: -100 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    is_masked = (torch.rand(ids.shape, generator=generator) < 0.35) & (ids > 5)
    return ids.masked_fill(is_masked, ALBEF_IDS["mask"]), ids.masked_fill(~is_masked, -100)


def batch_of(seed, dtype):
    """Return the batch of a step as the official data module makes it."""
    ids, mask = texts(seed + 2000)
    masked_ids, labels = masked(ids, seed + 2001)
    image, other = (randn(4, 3, 48, 48, seed=seed + k).to(dtype) for k in (1000, 1001))
    return {
        **{"text": [""] * 4, "text_ids": ids, "text_masks": mask, "image": [image]},
        **{"text_labels": torch.full_like(ids, -100), "text_ids_mlm": masked_ids},
        **{"text_labels_mlm": labels, "false_image_0": [other]},
    }


def record(root, seed, dtype=torch.float32):
    """Run one official training step, and return the tensors and the margins of both passes."""
    model = build(root).train()
    if dtype == torch.float64:
        use_plain_layer_norm_(model)
    draw_weights_(model, seed)
    before = weights(model)
    model.to(dtype)
    batch = batch_of(seed, dtype)
    passes, embeds = [], []
    infer = model.infer
    model.infer = lambda *args, **kwargs: passes.append(infer(*args, **kwargs)) or passes[-1]
    model.vit_model.register_forward_hook(lambda module, args, out: embeds.append(out))
    torch.manual_seed(LABEL_SEED)
    with recorded_sorts() as sorts:
        out = model(batch)
    (out["mlm_loss"] + out["itm_loss"]).backward()
    tensors = {"image": batch["image"][0], "false_image": batch["false_image_0"][0]}
    tensors |= {"input_ids": batch["text_ids"], "attention_mask": batch["text_masks"]}
    tensors |= {"mlm_input_ids": batch["text_ids_mlm"], "mlm_labels": batch["text_labels_mlm"]}
    tensors |= {name: out[name] for name in ("mlm_logits", "itm_logits")}
    tensors |= {"itm_labels": out["itm_labels"].long()}
    tensors |= {"loss_mlm": out["mlm_loss"], "loss_itm": out["itm_loss"]}
    margins = []
    for k, task in enumerate(("mlm", "itm")):
        stages, gaps = stage_tensors(sorts[3 * k : 3 * k + 3], KEEPS)
        margins += gaps
        got = {key: passes[k][key] for key in ("text_feats", "image_feats")}
        got |= dict(zip(("cls_text", "cls_image"), passes[k]["cls_feats"].chunk(2, 1), strict=True))
        got |= {key: tensor for key, tensor in stages.items() if "merge" not in key}
        got["image_embeds"] = embeds[k]
        tensors |= {f"{task}/{key}": tensor for key, tensor in got.items()}
    grads = gradients(model)
    used = {key.replace("grad/", "sd/"): tensor for key, tensor in grads.items()}
    return tensors | grads | {key: before[key] for key in used}, margins


def main(root):
    """Make the case."""
    torch.set_num_threads(1)
    tensors, facts = first_accurate_seed(record, root)
    save("meter_mlm_itm", tensors, source="ELIP", root=root, files=FILES, config=CONFIG, **facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
