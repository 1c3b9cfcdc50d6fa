"""An extension of mkdocstrings: paragraphs "name: description" of a class become a section."""

import re

import griffe

NAME = r"\w+(?: \([\w, ]+\))?"
FIELD = re.compile(rf"({NAME}(?:, (?:\.\., )?{NAME})*): ")


class Fields(griffe.Extension):
    """An extension that turns a paragraph whose lines begin with field names into a section."""

    def on_class(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Rewrite the docstring of a class that griffe has read."""
        if cls.docstring is not None:
            paragraphs = cls.docstring.value.split("\n\n")
            cls.docstring.value = "\n\n".join(map(_section, paragraphs))


def _section(paragraph: str) -> str:
    """Return the paragraph, or an `Attributes:` section if all its lines describe fields."""
    lines = re.split(r"\n(?! )", paragraph)
    named = [FIELD.match(line) for line in lines]
    if not all(named):
        return paragraph
    entries = [
        f"    {re.sub(r' .*', '', name)}: {line[match.end() :]}".replace("\n", "\n    ")
        for match, line in zip(named, lines, strict=True)
        for name in re.split(r", (?![^(]*\))", match[1])
        if name != ".."
    ]
    return "\n".join(["Attributes:", *entries])
