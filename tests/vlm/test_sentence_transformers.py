"""Page retrieval by sentence-transformers, with the lines that its users write."""

import numpy as np
import torch
import transformers
from PIL import Image
from sentence_transformers import MultiVectorEncoder
from tokenizers import Tokenizer, models

import elip_models
from tests.vlm.configs import CONFIGS, retrieval_model

PAGES, QUERIES = 10, ["what is it", "a cat"]


def max_similarities(query, page):
    """Return the MaxSim of one query (N, D) and one page (M, D), token by token."""
    return sum(max(float(q @ p) for p in page) for q in query)


def letters_tokenizer(config):
    """Return a tokenizer of letters with the image token of a config."""
    letters = ["<pad>", "<bos>", "<eos>", "?", *"abcdefghijklmnopqrstuvwxyzQ", " ", ":", ".", "\n"]
    letters += [f"<w{i}>" for i in range(len(letters), config.image_token_id)]
    vocab = {letter: i for i, letter in enumerate([*letters, "<image>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="?"))
    backend.add_special_tokens(["<image>", *letters[:3]])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "?"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens={"image_token": "<image>"}, **names
    )


def image_processor(config):
    """Return the image processor of a PaliGemma."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    processor = transformers.SiglipImageProcessor(size={"height": side, "width": side})
    processor.image_seq_length = (side // patch) ** 2
    return processor


def saved_colpali(folder):
    """Save a tiny ColPali of transformers with a processor that reads letters."""
    torch.manual_seed(0)
    config = CONFIGS["paligemma"]()
    images = image_processor(config)
    retrieval_model("colpali").eval().save_pretrained(folder)
    processor = transformers.ColPaliProcessor(images, letters_tokenizer(config))
    processor.save_pretrained(folder)
    return images.image_seq_length


def drawn_pages():
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)) for _ in range(PAGES)
    ]


def test_sentence_transformers_returns_and_scores_the_remaining_vectors(tmp_path):
    patches = saved_colpali(tmp_path / "dense")
    encoder = MultiVectorEncoder(str(tmp_path / "dense"), device="cpu")
    pages = drawn_pages()
    dense, queries = encoder.encode_document(pages), encoder.encode_query(QUERIES)
    elip_models.reduce_(encoder, "diverse", keep=0.5)
    vectors = encoder.encode_document(pages, batch_size=4)
    assert [len(page) for page in vectors] == [len(page) - patches // 2 for page in dense]
    for page in vectors:
        torch.testing.assert_close(page.norm(dim=-1), torch.ones(len(page)))
    for query, before in zip(encoder.encode_query(QUERIES), queries, strict=True):
        assert torch.equal(query, before)
    expected = [[max_similarities(query, page) for page in vectors] for query in queries]
    torch.testing.assert_close(encoder.similarity(queries, vectors), torch.tensor(expected))

    encoder.save_pretrained(str(tmp_path / "reduced"))
    loaded = MultiVectorEncoder(str(tmp_path / "reduced"), device="cpu")
    elip_models.reduce_(loaded)  # by the settings that its config stores
    for page, again in zip(vectors, loaded.encode_document(pages, batch_size=4), strict=True):
        torch.testing.assert_close(again, page)
    elip_models.unreduce_(encoder)
    for page, before in zip(encoder.encode_document(pages), dense, strict=True):
        torch.testing.assert_close(page, before)
