"""Damaged model folders."""

import shutil

from elip_models.models.registry import create_model
from tests.fuzz.harness import command, kind
from tests.fuzz.image_cases import damage


def save_model(folder):
    """A tiny model and its tokenizer, of which each case damages a copy."""
    from elip_models.data import train_tokenizer

    tokenizer = train_tokenizer(["a red dog", "two cats"] * 9, 300)
    sizes = {"vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = create_model("clip_tiny", vocab_size=len(tokenizer), **sizes, **ends)
    model.save_pretrained(folder, tokenizer=tokenizer)


@kind(share=0.3, prepare=save_model)
def models(folder, rng, prepared):
    model = shutil.copytree(prepared, folder / "model")
    path = rng.choice(sorted(model.iterdir()))
    path.write_bytes(damage(path.read_bytes(), rng))
    return command(["eval", "retrieval", "--model", str(model), "--data", "emoji_scenes:size=3"])
