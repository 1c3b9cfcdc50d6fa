"""Tokenizers: one trained on the captions without any download, or one loaded by name."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from elip_models.saving.files import read_object
from elip_models.saving.meta_build import check_config
from elip_models.validation import Bounds, check, require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# In the order of their ids. BERT-like and autoregressive models share bos/cls and eos/sep.
_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
MIN_VOCAB_SIZE = len(_SPECIAL_TOKENS) + 256
"""The special tokens, and one token for each byte."""


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a lower-casing byte-level BPE tokenizer that adds [CLS] and [SEP].

    [CLS] is both `cls_token` and `bos_token`, [SEP] both `sep_token` and `eos_token`; [PAD] has id
    0. It encodes any text. The same captions in the same order give the same tokenizer. ValueError
    is raised if vocab_size, the largest number of tokens, is less than `MIN_VOCAB_SIZE`.
    """
    with require_extra("train_tokenizer"):
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast
    check("vocab_size", vocab_size, Annotated[int, Bounds(MIN_VOCAB_SIZE)])
    begin, end = _SPECIAL_TOKENS["bos_token"], _SPECIAL_TOKENS["eos_token"]
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
    model.train_from_iterator(captions, trainer)
    model.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=[(token, model.token_to_id(token)) for token in (begin, end)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, cls_token=begin, sep_token=end, **_SPECIAL_TOKENS
    )


def load_tokenizer(name_or_path: str | Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer from a local folder or by its name on the hub.

    A missing eos token is replaced by the sep token, as for BERT. A missing pad token is replaced
    by the eos token.

    Raises:
        FileNotFoundError: There is no such tokenizer.
        ValueError: A file of it is damaged. Or it does not end a text with an eos or sep token, at
            which models pool the text.
    """
    name = str(name_or_path)
    with require_extra("load_tokenizer"):
        from transformers import AutoTokenizer
    try:
        if (config := Path(name) / "config.json").is_file():  # which names the class
            check_config(config, read_object(config))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.eos_token is None and tokenizer.sep_token is not None:
            tokenizer.eos_token = tokenizer.sep_token
        ids = tokenizer("a").input_ids
    except ImportError:
        raise
    except Exception as error:  # what the tokenizers library raises has no class of its own
        kind = ValueError if Path(name).is_dir() else FileNotFoundError
        raise kind(
            "name_or_path: expected a folder with a saved tokenizer or a name on the hub, got "
            f"{name!r}: {type(error).__name__}: {error!s:.1000}"
        ) from error
    if tokenizer.eos_token_id is None or ids[-1:] != [tokenizer.eos_token_id]:
        raise ValueError(
            "name_or_path: expected a tokenizer that ends a text with its eos or sep token, got "
            f"{name!r} with the eos token {tokenizer.eos_token!r}, whose text 'a' has the ids "
            f"{ids}; set its eos_token or its post-processor and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
