"""For mkdocstrings: what a class says of its fields, "name: what it is", becomes a section."""

import re

import griffe

NAME = r"\w+(?: \([\w, ]+\))?"
FIELD = re.compile(rf"({NAME}(?:, (?:\.\., )?{NAME})*): ")


class Fields(griffe.Extension):
    """Makes an `Attributes:` section of a paragraph whose lines begin with names of fields."""

    def on_class(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Rewrite the docstring of a class that griffe has read."""
        if cls.docstring is not None:
            paragraphs = cls.docstring.value.split("\n\n")
            cls.docstring.value = "\n\n".join(map(_section, paragraphs))


def _section(paragraph: str) -> str:
    """The paragraph, or the section that it is; one entry a name where a line names several."""
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
