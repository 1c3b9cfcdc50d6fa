"""JSON that others publish: parsed by `json`, validated by pydantic, errors that name the place."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from elip_models.validation import shortened

Kind = TypeVar("Kind")


def read_json(file: Path, expected: str) -> Any:
    """Return the content of a JSON file, or of each line of a JSON Lines file as a list.

    Raises:
        ValueError: It is invalid; the message names what is `expected`.
    """
    content = file.read_bytes()
    lines = [line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]
    is_lines = len(lines) > 1 and all(line.startswith(b"{") for line in lines[:2])
    try:
        if is_lines:
            return [json.loads(line, object_pairs_hook=_unique) for line in lines]
        return json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected {expected}, got no valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; Python itself would drop all but the last value of a key."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError(f"an object has a key twice, of {shortened([key for key, _ in pairs])}")
    return entry


def validate(kind: type[Kind], value: Any, where: str) -> Kind:
    """Return `value` as a pydantic type; raise ValueError for the first mistake, after `where`."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" for part in mistake["loc"])
        got = shortened(mistake["input"])
        raise ValueError(f"{where}{place}: {mistake['msg']}, got {got}") from error
