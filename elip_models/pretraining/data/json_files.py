"""Third-party JSON files, read with errors that name the file and the entry."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from elip_models.validation import describe_type, mismatch_error, shortened


def read_json(file: Path, expected: str) -> Any:
    """Return the content of a JSON file. Raise ValueError, naming `expected`, if it is invalid."""
    return _parse_json(file.read_bytes(), str(file), expected)


def _parse_json(content: bytes, file: str, expected: str) -> Any:
    try:
        return _parse(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected {expected}, got no valid JSON: {error}") from error


def _parse(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; Python itself would drop all but the last value of a key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shortened(twice)} twice")
    return found


def read_entries(file: Path, expected: str) -> list[Any]:
    """Return the entries of a JSON list or of a JSON Lines file, whatever the extension."""
    return parse_entries(file.read_bytes(), str(file), expected)


def parse_entries(content: bytes, file: str, expected: str) -> list[Any]:
    """Return the entries in the content of a JSON list or of a JSON Lines file."""
    if not content.decode("utf-8-sig", errors="replace").startswith("{"):
        entries = _parse_json(content, file, expected)
        if not isinstance(entries, list):
            raise ValueError(f"{file}: expected {expected}, got a {type(entries).__name__}")
        return entries
    entries = []
    for number, line in enumerate(content.splitlines()):
        try:
            entries.append(_parse(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}[{number}]: expected one JSON object a line, got {line!r:.80}: {error}"
            ) from error
    return entries


def read_fields(where: str, entry: Any, **expected: Any) -> tuple[Any, ...]:
    """Return the fields of one entry, each checked against the type hint in `expected`.

    Raises ValueError, which begins with `where`, if a field is missing or has another type.
    """
    if not isinstance(entry, dict) or not expected.keys() <= entry.keys():
        raise ValueError(
            f"{where}: expected the keys {', '.join(expected)}, got {shortened(entry)}"
        )
    for name, hint in expected.items():
        if mismatch_error(entry[name], hint) is not None:
            kind = "a list" if hint is list else describe_type(hint)
            raise ValueError(f"{where}: {name}: expected {kind}, got {shortened(entry[name])}")
    return tuple(entry[name] for name in expected)
