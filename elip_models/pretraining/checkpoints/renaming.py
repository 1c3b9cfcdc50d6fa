"""Renaming of tensors by a table of templates, which works in both directions.

    "visual.conv1.weight"                "visual.patch_embed.proj.weight"
    "encoder.layers.*.layer_norm1.*"     "blocks.*.norm1.*"
    "layers.*.{q,k,v}_proj.*"            "blocks.*.attn.qkv.*"
    "visual.proj"                        "image_projection.weight.T"

`*` matches one part of a name, at the end the whole rest. `{q,k,v}` matches three tensors that the
other side stacks along dim 0. `.T` at the end marks a transposed matrix.
"""

import re

import torch
from torch import Tensor

Names = dict[str, str]
QKV = "{q,k,v}"


def rename_tensors(weights: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return the weights under the names on the right of a table; other names do not change."""
    patterns = [(_pattern(left), left, right) for left, right in names.items()]
    renamed: dict[str, Tensor] = {}
    stacks: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        rules = ((pattern.fullmatch(name), *templates) for pattern, *templates in patterns)
        match, left, right = next((rule for rule in rules if rule[0]), (None, name, name))
        if match is None:
            renamed[name] = weight
            continue
        target = _filled(right.removesuffix(".T"), match)
        if QKV in left:
            stacks.setdefault(target, {})[match["qkv"]] = weight
        elif QKV in right:
            parts = zip("qkv", weight.chunk(3), strict=False)
            renamed |= {target.replace(QKV, letter): part for letter, part in parts}
        else:
            is_transposed = ".T" in (left[-2:], right[-2:]) and weight.ndim == 2
            renamed[target] = weight.T if is_transposed else weight
    for target, parts in stacks.items():
        renamed[target] = torch.cat([parts[letter] for letter in "qkv" if letter in parts])
    return renamed


def reversed_names(names: Names) -> Names:
    """Return the table from right to left; the first of several names on the left is used."""
    return {right: left for left, right in reversed(names.items())}


def _pattern(template: str) -> re.Pattern[str]:
    """Return a regular expression with a group for each star, and the group `qkv`."""
    text = re.escape(template.removesuffix(".T")).replace(re.escape(QKV), "(?P<qkv>[qkv])")
    text = re.sub(r"\\\*$", "(.+)", text)
    return re.compile(text.replace(r"\*", "([^.]+)"))


def _filled(template: str, match: re.Match[str]) -> str:
    """Replace the stars of the template by what the stars of the other side matched."""
    letter = match.re.groupindex.get("qkv")
    for number, part in enumerate(match.groups(), start=1):
        if number != letter:
            template = template.replace("*", part, 1)
    return template
