"""Renaming of tensors by a table of templates, which works in both directions.

    "visual.conv1.weight"                "visual.patch_embed.proj.weight"
    "encoder.layers.*.layer_norm1.*"     "blocks.*.norm1.*"
    "layers.*.{q,k,v}_proj.*"            "blocks.*.attn.qkv.*"
    "visual.proj"                        "image_projection.weight.T"

`*` matches one part of a name, at the end the whole rest. `{q,k,v}` matches three tensors that the
other side stacks along dim 0. `.T` at the end marks a transposed matrix.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

Names = dict[str, str]
QKV = "{q,k,v}"


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    left: str
    right: str


def rename_tensors(weights: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return the weights under the names on the right of a table; other names do not change."""
    rules = [_Rule(_pattern(left), left, right) for left, right in names.items()]
    out: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, str]] = {}
    for name, weight in weights.items():
        found = ((rule.pattern.fullmatch(name), rule) for rule in rules)
        match, rule = next((pair for pair in found if pair[0] is not None), (None, None))
        if rule is None:
            out[name] = weight
            continue
        target = _fill(rule.right.removesuffix(".T"), match)
        if QKV in rule.left:
            stacked.setdefault(target, {})[match["qkv"]] = name
        elif QKV in rule.right:
            if weight.ndim == 0 or len(weight) % 3:
                out[name] = weight  # not three of one size: loading raises an error for its name
                continue
            out |= {target.replace(QKV, c): w for c, w in zip("qkv", weight.chunk(3), strict=True)}
        else:
            is_transposed = rule.left.endswith(".T") or rule.right.endswith(".T")
            out[target] = weight.mT if is_transposed and weight.ndim > 1 else weight
    for target, parts in stacked.items():
        kinds = {(weights[name].dtype, weights[name].shape) for name in parts.values()}
        if (
            len(parts) == 3
            and len(kinds) == 1
            and torch.Size() not in (shape for _, shape in kinds)
        ):
            out[target] = torch.cat([weights[parts[c]] for c in "qkv"])
        else:
            out |= {name: weights[name] for name in parts.values()}
    return out


def reversed_names(names: Names) -> Names:
    """Return the table from right to left; the first of several names on the left is used."""
    table: Names = {}
    for left, right in names.items():
        table.setdefault(right, left)
    return table


def _pattern(template: str) -> re.Pattern[str]:
    """Return a regular expression with a group for each star, and the group `qkv`."""
    text = re.escape(template.removesuffix(".T")).replace(re.escape(QKV), "(?P<qkv>[qkv])")
    ends_open = text.endswith(r"\*")
    text = text.removesuffix(r"\*").replace(r"\*", "([^.]+)")
    return re.compile(text + "(.+)" if ends_open else text)


def _fill(template: str, match: re.Match[str]) -> str:
    """Replace the stars of the template by what the stars of the other side matched."""
    letter = match.re.groupindex.get("qkv")
    for number, part in enumerate(match.groups(), start=1):
        if number != letter:
            template = template.replace("*", part, 1)
    return template
