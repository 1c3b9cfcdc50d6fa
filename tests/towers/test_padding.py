"""Batches of images of different sizes: patches with a mask, in models that take them so."""

import pytest
import torch
import transformers
from timm.models.naflexvit import NaFlexVit
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

import elip_models
from elip_models.towers import as_tower
from tests.helpers.models import HF, enlarged, naflex

GRIDS = ((3, 4), (6, 6), (2, 5), (1, 1), (5, 7))
P, CHANNELS = 8, 3 * 8 * 8


def siglip2(**options):
    sizes = {name: n for name, n in HF.items() if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=36, **options)
    return transformers.Siglip2VisionModel(config)


def idefics3():
    return Idefics3VisionTransformer(transformers.Idefics3VisionConfig(**HF))


MODELS = {
    "SigLIP 2": siglip2,
    "SigLIP 2 without head": lambda: siglip2(vision_use_head=False),
    "Idefics3": idefics3,
    "NaFlex map": lambda: naflex(global_pool="map"),
    "NaFlex avg": lambda: naflex(global_pool="avg", reg_tokens=1),
    "NaFlex token": lambda: naflex(global_pool="token", class_token=True, reg_tokens=2),
    "NaFlex keys alone": lambda: naflex(global_pool="map", use_key_only_attn_mask=True),
    "NaFlex axial": lambda: naflex(rope_type="axial", class_token=True, global_pool="token"),
    "NaFlex DINOv3": lambda: naflex(rope_type="dinov3", reg_tokens=2, rope_rotate_half=True),
}
ROTARY = {"NaFlex axial", "NaFlex DINOv3"}
models = pytest.mark.parametrize(
    "name", [pytest.param(m, marks=pytest.mark.slow) if m in ROTARY else m for m in MODELS]
)
HAS_CLS = "NaFlex token"


def model_of(name):
    torch.manual_seed(0)
    return enlarged(MODELS[name]()).eval().double()


def pictures(grids=GRIDS):
    """One image for each grid (rows, columns) of patches."""
    return [torch.randn(3, rows * P, columns * P).double() for rows, columns in grids]


def patches_of(image):
    return image.unfold(1, P, P).unfold(2, P, P).permute(1, 2, 3, 4, 0).reshape(-1, CHANNELS)


def features(model, batch, length=None, call=None):
    """The features of each image of a batch that is padded to `length` patches, or its longest.

    `call` is called in place of the model.
    """
    call = model if call is None else call
    grids = [(each.shape[1] // P, each.shape[2] // P) for each in batch]
    if isinstance(model, Idefics3VisionTransformer):
        return idefics_features(call, batch, grids)
    length = length or max(rows * columns for rows, columns in grids)
    patches = torch.randn(len(batch), length, CHANNELS).double()
    valid, coord = torch.zeros(len(batch), length).bool(), torch.zeros(len(batch), length, 2).long()
    for b, (image, (rows, columns)) in enumerate(zip(batch, grids, strict=True)):
        n = rows * columns
        patches[b, :n], valid[b, :n] = patches_of(image), True
        coord[b, :n] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    if isinstance(model, NaFlexVit):
        return list(call({"patches": patches, "patch_coord": coord, "patch_valid": valid}))
    out = call(patches, valid.long(), torch.tensor(grids))
    if out.pooler_output is not None:
        return list(out.pooler_output)
    return real_tokens(out.last_hidden_state, valid)


def idefics_features(call, batch, grids):
    """Of images in the corner of the largest picture, so that padding stands between patches."""
    rows, columns = (max(sides) for sides in zip(*grids, strict=True))
    pixels = torch.randn(len(batch), 3, rows * P, columns * P).double()
    mask = torch.zeros(len(batch), rows, columns).bool()
    for b, (image, (height, width)) in enumerate(zip(batch, grids, strict=True)):
        pixels[b, :, : height * P, : width * P], mask[b, :height, :width] = image, True
    tokens = call(pixels, patch_attention_mask=mask).last_hidden_state
    return real_tokens(tokens, mask.flatten(1))


def real_tokens(tokens, valid):
    """The tokens of each image of a padded batch; of a batch without padding, as they are."""
    if valid.all():
        return list(tokens)
    return [each[real] for each, real in zip(tokens, valid, strict=True)]


def alone(model, image, is_grid):
    """The features of an image alone, and how many tokens are left; with `is_grid` of each patch.

    A model that returns the tokens of its last block returns a whole grid of a padded batch.
    """
    with elip_models.record_stages(model) as infos:
        (found,) = features(model, [image])
    source = None
    for info in infos:
        source = info.reduction.source_map(source)
    if is_grid and source is not None:
        found = found[source[0].to(torch.uint8).argmax(0)]
    if not infos:
        return found, None
    mask = infos[-1].mask
    return found, infos[-1].reduction.num_rows if mask is None else mask[0].sum()


STRATEGIES = {
    "default": {},
    "tome:r=5": {"strategy": "tome:r=5"},
    "half": {"keep": 0.5},
    "late": {"strategy": elip_models.ToMe((0, 0, 9, 0, 4, 3))},
    "not proportional": {"strategy": elip_models.ToMe(5, proportional=False, compare="keys")},
    "norms": {"strategy": elip_models.ToMe(5, keep_norm=True, compare="tokens")},
}


QUICK = {"default", "not proportional"}


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in STRATEGIES],
)
@models
@torch.no_grad()
def test_an_image_of_a_padded_batch_is_reduced_as_it_is_alone(name, strategy):
    model, batch = model_of(name), pictures()
    dense = features(model, batch, 40)
    elip_models.reduce_(model, **STRATEGIES[strategy])
    with elip_models.record_stages(model) as infos:
        padded = features(model, batch, 40)
    p = as_tower(model).num_prefix_tokens
    assert infos[0].sizes.shape[1] < p + 36  # the longest image
    counts = [rows * columns for rows, columns in GRIDS]
    assert infos[-1].sizes.sum(1).tolist() == [p + n for n in counts]
    assert torch.equal(infos[-1].mask, infos[-1].sizes > 0)
    for b, image in enumerate(batch):
        expected, left = alone(model, image, is_grid=padded[b].dim() == 2)
        torch.testing.assert_close(padded[b], expected, atol=1e-6, rtol=1e-6)
        assert infos[-1].mask[b].sum() == (left or p + counts[b])
    assert not torch.allclose(padded[1], dense[1], atol=1e-3)


@models
@torch.no_grad()
def test_parts_add_up_to_the_model_on_images_of_one_size(name):
    model, batch = model_of(name), pictures([(5, 4)] * 2)
    tower, entered = as_tower(model).resized_for(torch.stack(batch)), []
    handle = tower.blocks[0].register_forward_pre_hook(lambda module, x: entered.append(x[0]))
    features(model, batch)
    handle.remove()
    tokens = tower.embed(torch.stack(batch))
    torch.testing.assert_close(tokens, entered[0], atol=1e-9, rtol=1e-9)
    for i in range(tower.depth):
        whole = tower.block(i, tokens)
        torch.testing.assert_close(tower.mlp(i, tower.attend(i, tokens)), whole)
        tokens = whole
    assert elip_models.encode_image(model, torch.stack(batch)).shape[1] < tokens.shape[1]
    grid = tower.embed(torch.zeros(1, 3, *tower.image_size).double())
    assert grid.shape[1] == tower.size.num_tokens


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("SigLIP 2", "tome:r=5"),
        ("NaFlex avg", "tome:r=5"),
        pytest.param(HAS_CLS, "guided_tome:r=5", marks=pytest.mark.slow),
        pytest.param("NaFlex axial", "tome:r=1", marks=pytest.mark.slow),
        pytest.param("NaFlex DINOv3", "tome:r=3", marks=pytest.mark.slow),
    ],
)
def test_gradients_and_checkpoints_are_those_of_the_images_alone(name, strategy):
    model, batch = model_of(name).train(), pictures([(3, 4), (6, 6), (2, 5), (2, 4), (5, 7)])
    elip_models.reduce_(model, strategy=strategy)
    sum(features(model, [image])[0].square().sum() for image in batch).backward()
    alone = {key: weight.grad for key, weight in model.named_parameters()}
    model.zero_grad()
    for checkpoints in (False, True):
        if checkpoints and name == "SigLIP 2":
            model.gradient_checkpointing_enable()
        elif checkpoints:
            model.set_grad_checkpointing()
        torch.stack(features(model, batch, 40)).square().sum().backward()
        for key, weight in model.named_parameters():
            torch.testing.assert_close(weight.grad, alone[key], atol=1e-6, rtol=1e-6)
        model.zero_grad()


@pytest.mark.parametrize(
    ("strategy", "name", "reason"),
    [
        ("evit", HAS_CLS, "takes the mask of a padded batch"),
        ("elip:schedule=clip", HAS_CLS, "takes the mask of a padded batch"),
        ("random", "SigLIP 2", "takes the mask of a padded batch"),
        ("random:merge=none", "NaFlex avg", "merges, since the model pools patches"),
    ],
)
@torch.no_grad()
def test_strategies_without_masks_need_images_of_one_size(strategy, name, reason):
    model, batch = elip_models.reduce_(model_of(name), strategy=strategy), pictures()
    with pytest.raises(ValueError, match=f"strategy: expected one that {reason}"):
        features(model, batch)
    if "none" in strategy:
        assert model(pictures([(6, 6)])[0][None]).shape == (1, 5)
        return
    with elip_models.record_stages(model) as infos:
        alone = features(model, pictures([(5, 4)]) * 2)
    assert infos and infos[-1].reduction.num_rows < 20
    if strategy != "random":  # it draws for each image
        torch.testing.assert_close(*alone)


def test_masks_that_hide_more_than_padding_are_refused():
    model = elip_models.reduce_(model_of("NaFlex map"))
    patches, coord = torch.randn(2, 4, CHANNELS).double(), torch.zeros(2, 4, 2).long()
    batch = {"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(2, 4).bool()}
    causal = torch.zeros(2, 1, 4, 4).double().masked_fill(torch.ones(4, 4).triu(1).bool(), -1e300)
    for mask in (causal, torch.full((2, 1, 4, 4), -2.0).double().tril(-1), causal[:, 0]):
        with pytest.raises(ValueError, match="attn_mask: expected one that hides padding alone"):
            model(batch | {"attn_mask": mask})
    batch["patch_valid"] = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match="mask: expected a real patch in each image, got 0 in one"):
        model(batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Idefics3"])
@torch.no_grad()
def test_a_graph_reads_the_mask_as_a_tensor(name):
    """A graph keeps the length of the batch, and one graph serves all masks."""
    torch._dynamo.reset()
    model = elip_models.reduce_(model_of(name), strategy="tome:r=5")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = pictures()
    for order in ([0, 1, 2, 3, 4], [1, 4, 0, 2, 2]):
        batch = [batch[k] for k in order]
        expected, found = features(model, batch, 40), features(model, batch, 40, compiled)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
