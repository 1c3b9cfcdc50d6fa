"""Folders of saved models, local or on the Hugging Face hub, and their model cards."""

import os
from pathlib import Path

from elip_models.saving.saved_folder import recover
from elip_models.strategies.dense import Dense
from elip_models.strategies.flops import dense_flops, strategy_flops
from elip_models.strategies.strategy import Strategy
from elip_models.towers import TowerSize
from elip_models.validation import check, require_extra

with require_extra("elip_models.saving"):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
CARD = """---
{{ card_data }}
---

# {{ name }}

{{ about }}

## Cost of the image tower

Computed, not measured, for one image of {{ image }} pixels. The FLOPs include the token selection.

{{ table }}

## Use

```python
{{ usage }}
```
"""


def fetch_folder(name: str | os.PathLike, *, token: str | bool | None = None) -> Path:
    """Return the local folder of a saved model, downloaded from the hub if necessary.

    `name` is a folder, 'owner/name' or 'owner/name@revision'. Without `token`, the hub uses the one
    that `hf auth login` stored. FileNotFoundError is raised if neither can be found.
    """
    check("folder", name, str | os.PathLike)
    if os.path.isdir(name) or recover(name):  # False for a name that no file can have
        return Path(name)
    repository, _, revision = str(name).partition("@")
    try:
        path = snapshot_download(
            repository, revision=revision or None, allow_patterns=[*FILES], token=token
        )
    except (OSError, HFValidationError) as error:
        reason, *_ = str(error).split("\n")
        raise FileNotFoundError(
            f"folder: expected an existing folder, or 'owner/name' of a hub repository that can be "
            f"downloaded, got {str(name)!r}: {reason}"
        ) from error
    return Path(path)


def card_values(strategy: Strategy, size: TowerSize) -> dict[str, str]:
    """Return the image size, and a table of tokens and FLOPs dense and reduced, for `CARD`."""
    dense = dense_flops(size)
    rows = [
        "| | tokens in each layer | GFLOPs, forward | GFLOPs, training step |",
        "|" + " --- |" * 4,
    ]
    for method in dict.fromkeys((Dense(), strategy)):
        flops = dense if isinstance(method, Dense) else strategy_flops(method, size)
        tokens = ", ".join(str(layer.attention) for layer in method.token_counts(size))
        shares = (
            f"{some / 1e9:.3g} ({some / every:.0%})"
            for some, every in zip(flops, dense, strict=True)
        )
        rows.append(f"| `{method}` | {tokens} | {' | '.join(shares)} |")
    height, width = size.image
    return {"image": f"{height} x {width}", "table": "\n".join(rows)}
