"""Built-in scenes written to files, as a data set that a user has: shards, images and a list."""

import io
import json

from elip_models.pretraining.data import EmojiScenes
from tests.helpers.damage import shard

NUM_SHARDS = 4
SCENES_A_SHARD = 50
TEST_SCENES = 10


def png(image):
    """Return a PNG with a palette, which most published images of this kind have."""
    file = io.BytesIO()
    image.quantize().save(file, "PNG")
    return file.getvalue()


def members(source, indices):
    """Return the members of a shard: an image, a caption and a description of each scene."""
    found = []
    for index in indices:
        image, captions, key = source[index]
        found += [
            (f"{key}.png", png(image)),
            (f"{key}.txt", captions[-1].encode()),
            (f"{key}.json", json.dumps({"captions": captions}).encode()),
        ]
    return found


def write_scene_files(folder):
    """Write `train-0000.tar` to `train-0003.tar`, `test-0000.tar`, `test.json` and its images."""
    train = EmojiScenes(NUM_SHARDS * SCENES_A_SHARD, seed=1)
    for number in range(NUM_SHARDS):
        indices = range(number * SCENES_A_SHARD, (number + 1) * SCENES_A_SHARD)
        shard(folder / f"train-{number:04d}.tar", members(train, indices))
    test = EmojiScenes(TEST_SCENES, seed=2)
    shard(folder / "test-0000.tar", members(test, range(TEST_SCENES)))
    (folder / "images").mkdir()
    entries = []
    for image, captions, key in test:
        (folder / "images" / f"{key}.png").write_bytes(png(image))
        entry = {"image": f"images/{key}.png", "image_id": key, "caption": list(captions)}
        entries.append(entry)
    (folder / "test.json").write_text(json.dumps(entries))
    return folder
