"""Tokenizers: one trained on the captions without any download, or one loaded by name."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from elip_models.pretraining.data.json_files import read_json
from elip_models.validation import Bounds, check, require_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# In the order of their ids. BERT-like and autoregressive models share bos/cls and eos/sep.
_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "config.json"),
)
"""Files of a saved tokenizer that have a JSON object; config.json is the model's."""
_BYTES = 256
MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + _BYTES
"""The special tokens, and one token for each byte."""


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a lower-casing byte-level BPE tokenizer that adds [CLS] and [SEP].

    [CLS] is both `cls_token` and `bos_token`, [SEP] both `sep_token` and `eos_token`; [PAD] has id
    0. It encodes any text. The same captions in the same order give the same tokenizer.

    Args:
        captions: At least one text.
        vocab_size: Largest number of tokens, at least `MIN_VOCAB_SIZE`.

    Raises:
        TypeError, ValueError: An argument has another type, or is out of range.
    """
    with require_extra("train_tokenizer"):
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    check("vocab_size", vocab_size, Annotated[int, Bounds(MIN_VOCAB_SIZE)])
    model = Tokenizer(models.BPE(unk_token=_SPECIAL_TOKENS["unk_token"]))
    model.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_check_texts(captions), trainer)
    model.post_processor = _wrap_in_cls_and_sep(model)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        cls_token=_SPECIAL_TOKENS["bos_token"],
        sep_token=_SPECIAL_TOKENS["eos_token"],
        **_SPECIAL_TOKENS,
    )


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a local folder or by its name on the hub.

    A missing eos token is replaced by the sep token, as for BERT. A missing pad token is replaced
    by the eos token.

    Raises:
        FileNotFoundError: There is no such tokenizer.
        ValueError: A file of it is damaged or has other content. Or it does not end a text with an
            eos or sep token, at which models pool the text.
    """
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path: expected a folder or a name, got {name_or_path!r}")
    tokenizer, ids = _open_tokenizer(name_or_path)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "name_or_path: expected a tokenizer with an eos or sep token, "
            f"got {str(name_or_path)!r} with none; set its eos_token and save it again"
        )
    if ids[-1:] != [tokenizer.eos_token_id]:
        raise ValueError(
            f"name_or_path: expected a tokenizer that ends a text with {tokenizer.eos_token!r}, "
            f"got {str(name_or_path)!r}, which does not; add a post-processor and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_tokenizer(name: str | Path) -> "tuple[PreTrainedTokenizerBase, list[int]]":
    """Return a tokenizer, with its sep token as eos token if it has none, and the ids of a text."""
    with require_extra("load_tokenizer"):
        from transformers import AutoTokenizer
    for file in (Path(name) / each for each in _FILES):
        if os.path.isfile(file) and not isinstance(read_json(file, "a JSON object"), dict):
            raise ValueError(f"name_or_path: expected a JSON object in {file}, got other JSON")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.eos_token is None and tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token
        return tokenizer, tokenizer("a").input_ids
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"name_or_path: expected a folder with a saved tokenizer or a name on the hub, "
            f"got {str(name)!r}: {str(error)[:1000]}"
        ) from error
    except ImportError:
        raise
    except Exception as error:  # what the tokenizers library raises has no class of its own
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"name_or_path: expected files of a tokenizer in {str(name)!r}, got {reason:.300}"
        ) from error


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], context_length: int
) -> dict[str, Tensor]:
    """Return "input_ids" and "attention_mask", (B, context_length) int64, padded or truncated."""
    encoded = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=context_length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _wrap_in_cls_and_sep(model: "Tokenizer") -> "TemplateProcessing":
    """Return the post-processor: [CLS] text [SEP], or [CLS] text [SEP] other text [SEP]."""
    from tokenizers.processors import TemplateProcessing

    begin, end = _SPECIAL_TOKENS["bos_token"], _SPECIAL_TOKENS["eos_token"]
    return TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, model.token_to_id(token)) for token in (begin, end)],
    )


def _check_texts(captions: Iterable[str]) -> Iterator[str]:
    if isinstance(captions, str):
        raise TypeError(f"captions: expected several texts, got the single text {captions!r:.100}")
    number = 0
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"captions: expected texts, got {caption!r:.100}")
        number += 1
        yield caption
    if number == 0:
        raise ValueError("captions: expected at least one text, got none")
