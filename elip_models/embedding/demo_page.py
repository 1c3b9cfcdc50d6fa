"""The page of `elip demo`, built with Gradio and served to this machine only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elip_models.embedding.contact_sheet import figures
from elip_models.embedding.demo import Comparison, DemoModel, Times
from elip_models.embedding.encoder import Encoder
from elip_models.embedding.search import search
from elip_models.images import MAX_IMAGE_BYTES, SampleError
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.embedding.demo_page"):
    import gradio

LOCALHOST = "127.0.0.1"
KEPT_SECONDS = 3600  # of uploaded and shown pictures
FONTS = ("system-ui", "sans-serif")  # of the browser: none is loaded
SHOWN = 24  # images that a search shows
STYLE = """#picture img, #merged img { width: 100%; height: 100%; object-fit: contain; }
#found { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
#found figure { margin: 0; overflow-wrap: anywhere; }
#found img { width: 100%; height: 140px; object-fit: contain; }"""
INTRODUCTION = """# What does token reduction merge?
A vision transformer cuts an image into patches, one token each. Token reduction merges similar
tokens or drops unimportant ones, so that the model computes less. Choose an image and move the
sliders."""
LEGEND = (
    "Patches of one token have their mean colour and an outline; they may be in separate areas. "
    "Dropped patches are grey."
)
NO_IMAGE = "Choose an image first."
BAR = (
    '<div style="flex: 1; text-align: center"><div style="height: 80px; display: flex; '
    'align-items: end"><div style="width: 100%; height: {share:.1%}; background: '
    'var(--primary-500)"></div></div>{share:.0%}<br><b>{block}</b></div>'
)


def build_page(
    demo: DemoModel, *, batch_size: int, embeddings: tuple[Path, Encoder] | None = None
) -> gradio.Blocks:
    """Return the page for one model.

    Args:
        demo: the model.
        batch_size: times are measured on batches of so many images.
        embeddings: a folder of `embed` to search in, and the encoder of its model.
    """
    with gradio.Blocks(
        title=f"elip demo: {demo.dense.name}",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        gradio.Markdown(INTRODUCTION)
        image = _add_comparison(demo, batch_size)
        if embeddings is not None:
            _add_search(image, *embeddings)
    return page


def _add_comparison(demo: DemoModel, batch_size: int) -> gradio.File:
    """Add the comparison of a dense and a reduced model, and return the input of the image."""
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            inputs, button = _add_inputs(demo)
        with gradio.Column(scale=3):
            message, outputs = _add_outputs(has_text=demo.dense.has_text)

    def show(*values: Any) -> Iterator[dict]:
        """Show the figures, then also the times, which take longer; or a message."""
        try:
            for found in _results(demo, batch_size, *values):
                yield dict(zip(outputs, found, strict=True)) | {message: _message("")}
        except (SampleError, TypeError, ValueError) as error:
            yield dict.fromkeys(outputs) | {message: _message(str(error))}

    *others, _ = inputs
    gradio.on(
        [*(each.change for each in others), button.click],
        show,
        inputs,
        [message, *outputs],
        trigger_mode="always_last",
        concurrency_limit=1,  # over all browsers, so that nothing else runs while time is measured
        show_progress="minimal",
        api_visibility="private",
    )
    return inputs[0]


def _add_search(image: gradio.File, folder: Path, encoder: Encoder) -> None:
    """Add a search in a folder of embeddings, by a text or by the image of the comparison."""
    gradio.Markdown(f"## Search in `{folder}`")
    with gradio.Row():
        text = gradio.Textbox(
            label="Text", max_length=1000, visible=encoder.has_text, scale=3, elem_id="query"
        )
        button = gradio.Button("Find images like the image above", scale=1, elem_id="similar")
    message = gradio.Textbox(visible=False, label="Message", interactive=False, elem_id="problem")
    found = gradio.HTML(elem_id="results")
    outputs, options = [message, found], {"api_visibility": "private", "concurrency_limit": 1}

    def find(query: str | Path) -> tuple[dict, str]:
        try:
            hits = search(folder, query, top=SHOWN, model=encoder).hits
        except ConfigError as error:
            return _message(str(error)), ""
        return _message(""), f'<div id="found">{figures(hits)}</div>'

    def find_similar(path: str | None) -> tuple[dict, str]:
        return (_message(NO_IMAGE), "") if path is None else find(Path(path))

    text.submit(find, text, outputs, **options)
    button.click(find_similar, image, outputs, **options)


def _add_inputs(demo: DemoModel) -> tuple[list[gradio.components.Component], gradio.Button]:
    """Add image, strategy, keep, block and captions, and a button to rank the captions."""
    choices, depth, has_text = demo.choices, demo.tower.depth, demo.dense.has_text
    inputs = [
        gradio.File(label="Image", type="filepath", height=130, elem_id="image"),
        gradio.Dropdown(choices, value=demo.default_choice, label="Strategy", elem_id="strategy"),
        gradio.Slider(
            0.2,
            1.0,
            value=demo.default_keep,
            step=0.01,
            label="Keep",
            info="Share of the tokens, mean over the blocks",
            elem_id="keep",
        ),
        gradio.Slider(
            1,
            depth,
            value=(depth + 1) // 2,
            step=1,
            label="Block",
            info=f"Draw the tokens after this block of {depth}",
            elem_id="block",
        ),
        gradio.Textbox(
            label="Captions",
            info="One a line, to rank by similarity to the image",
            lines=4,
            max_length=10_000,
            visible=has_text,
            elem_id="captions",
        ),
    ]
    return inputs, gradio.Button("Rank captions", visible=has_text, elem_id="rank")


def _add_outputs(
    *, has_text: bool
) -> tuple[gradio.components.Component, list[gradio.components.Component]]:
    """Add the message; and image, merged tokens, figures, tokens by block and ranking."""
    message = gradio.Textbox(NO_IMAGE, label="Message", interactive=False, elem_id="message")
    options = {"format": "png", "interactive": False, "buttons": [], "height": 340}
    with gradio.Row():
        picture = gradio.Image(label="Image, as the model reads it", elem_id="picture", **options)
        merged = gradio.Image(label="Merged tokens", elem_id="merged", **options)
    with gradio.Row():
        figures = gradio.Markdown(elem_id="figures")
        bars = gradio.HTML(elem_id="bars")
    ranking = gradio.Dataframe(
        label="Captions: rank, and cosine with the image",
        headers=["caption", "dense", "reduced"],
        column_widths=["70%", "15%", "15%"],
        visible=has_text,
        interactive=False,
        elem_id="ranking",
    )
    return message, [picture, merged, figures, bars, ranking]


def _message(text: str) -> dict:
    return gradio.update(value=text, visible=bool(text))


def _results(
    demo: DemoModel,
    batch_size: int,
    path: str | None,
    choice: str,
    keep: float,
    block: int,
    text: str | None,
) -> Iterator[tuple]:
    """Yield the values of the outputs: without the times, then with them."""
    if path is None:
        raise ConfigError(NO_IMAGE)
    captions = [line.strip() for line in (text or "").splitlines() if line.strip()]
    strategy = demo.strategy(choice, keep)
    pixels = demo.read(Path(path))
    found = demo.compare(pixels, strategy, block, captions)
    others = draw_bars(found), ranking_table(found)
    yield found.image, found.merged, describe(found, block, None), *others
    times = demo.time(pixels, strategy, batch_size)
    yield found.image, found.merged, describe(found, block, times), *others


def describe(found: Comparison, block: int, times: Times | None) -> str:
    """Return the figures of an image as a table in Markdown; the times are None until measured."""
    left = found.tokens[block - 1]
    measured = ("..", "measuring")
    if times is not None:
        measured = (f"{times.dense:.1f} ms", f"{times.ratio:.2f} of dense")
    batch = "" if times is None else f", {times.batch_size} images"
    return "\n".join(
        (
            "| | dense | reduced |",
            "|:--|--:|--:|",
            f"| tokens after block {block} | {found.patches} | {left} |",
            f"| cosine with the dense feature | 1 | {found.cosine:.4f} |",
            f"| measured time{batch} | {measured[0]} | {measured[1]} |",
            "",
            f"`{found.strategy}`. {LEGEND}",
        )
    )


def draw_bars(found: Comparison) -> str:
    """Return bars in HTML: the share of tokens after each block."""
    shares = [tokens / found.patches for tokens in found.tokens]
    bars = (BAR.format(share=share, block=i) for i, share in enumerate(shares, start=1))
    row = f'<div style="display: flex; gap: 3px; font-size: 11px">{"".join(bars)}</div>'
    return f"<div>Tokens that are left after each block</div>{row}"


def ranking_table(found: Comparison) -> list[list[str]]:
    """Return a row for each caption: its text, its dense and its reduced rank and cosine."""
    if not found.ranking:
        return []
    captions, *columns = zip(*found.ranking, strict=True)
    ranked = []
    for values in columns:
        order = sorted(values, reverse=True)
        ranked.append([f"{order.index(value) + 1}. ({value:.3f})" for value in values])
    return [list(row) for row in zip(captions, *ranked, strict=True)]


def serve(page: gradio.Blocks, *, port: int, **options: Any) -> None:
    """Serve the page to programs of this machine, until the process is interrupted.

    Raises:
        ConfigError: another program uses the port.
    """
    try:
        page.launch(
            server_name=LOCALHOST,
            server_port=port,
            share=False,
            max_file_size=MAX_IMAGE_BYTES,
            theme=gradio.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=STYLE,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            quiet=True,
            **options,
        )
    except OSError as error:
        raise ConfigError(
            f"--port: expected a free port of {LOCALHOST}, got {port} ({error}); pass another one"
        ) from error
