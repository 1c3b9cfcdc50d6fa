"""What a search found as one HTML page with thumbnails, which loads nothing from elsewhere."""

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from PIL import Image

from elip_models.embedding.search import Found, Hit
from elip_models.embedding.stored import Stored, read
from elip_models.images import SampleError, decode_image

SIDE = 240  # pixels of a thumbnail
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }}
body {{ margin: 2rem; }}
header img {{ max-height: 160px; }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }}
figure {{ margin: 0; padding: .75rem; border: 1px solid #8886; border-radius: 6px; }}
main img {{ width: 100%; height: 180px; object-fit: contain; }}
figcaption {{ overflow-wrap: anywhere; }}
</style>
<header>
<h1>{title}</h1>
{query}<p>{summary}</p>
</header>
<main>
{figures}
</main>
</html>
"""


def contact_sheet(found: Found) -> str:
    """Return an HTML page of the images that a search found.

    Images that are files of this machine have a thumbnail; of others the page has the key alone.
    """
    how = "all compared" if found.index is None else f"by an index of kind {found.index}"
    summary = f"{len(found.hits)} of {found.images} images in {found.folder}, {how}"
    is_image = found.query.kind == "image"
    return PAGE.format(
        title=escape(Path(found.query.value).name if is_image else found.query.value),
        query=_picture(found.query.value) if is_image else "",
        summary=escape(summary),
        figures=figures(found.hits),
    )


def figures(hits: Sequence[Hit]) -> str:
    """Return an HTML element for each image: its thumbnail, rank, similarity and key."""
    return "\n".join(map(_figure, hits))


def _figure(hit: Hit) -> str:
    name = escape(hit.key)
    where = "" if hit.path is None else f' title="{escape(hit.path)}"'
    picture = "" if hit.path is None else _picture(hit.path)
    caption = f"<b>{hit.rank}</b> · {hit.similarity:.3f}<br>{name}"
    return f"<figure{where}>{picture}<figcaption>{caption}</figcaption></figure>"


def _picture(path: str) -> str:
    """Return an element with a small copy of an image, or nothing if it cannot be read."""
    with suppress(SampleError):
        image = decode_image(io.BytesIO(read(Stored(path))), path)
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "JPEG", quality=85)
        encoded = base64.b64encode(content.getvalue()).decode()
        return f'<img alt="" src="data:image/jpeg;base64,{encoded}">'
    return ""
