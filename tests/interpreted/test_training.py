"""Training with the kernels gives the same losses as with the PyTorch implementation."""

import torch

import elip_models
from elip_kernels.testing import kernels_on_cpu


def losses(steps):
    torch.manual_seed(0)
    model = elip_models.create_model(
        "elip_clip_tiny",
        image_size=32,
        vision_width=24,
        vision_heads=2,
        text_width=16,
        text_heads=2,
        text_depth=1,
        vocab_size=64,
        context_length=8,
        embed_dim=16,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32)
        input_ids = torch.randint(3, 64, (4, 8))
        input_ids[:, -1] = 2
        loss = model(images, input_ids, torch.ones_like(input_ids)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return torch.tensor(history)


def test_kernels_train_as_the_reference():
    steps = 2
    expected = losses(steps)
    with kernels_on_cpu() as launches:
        got = losses(steps)
    assert launches["elip::score_reduce"] == launches["elip::reduce_backward"] == 3 * steps
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0
