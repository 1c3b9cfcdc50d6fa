"""The page of `elip demo`, built with Gradio and served to this machine only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas

from elip_models.data.sample import MAX_IMAGE_BYTES, SampleError
from elip_models.embedding.demo import Comparison, DemoModel, Times
from elip_models.validation import ConfigError, require_extra

with require_extra("elip_models.embedding.demo_page"):
    import gradio

LOCALHOST = "127.0.0.1"
SECONDS_OF_UPLOADS = 3600
FONTS = ("system-ui", "sans-serif")  # of the browser, so that none is loaded
INTRODUCTION = """# What does token reduction merge?
A vision transformer cuts an image into patches, one token each. Token reduction merges similar tokens or drops
unimportant ones, so that the model needs less time. Choose an image and move the slider."""
LEGEND = (
    "Patches of one token have their mean colour and an outline; they may be in separate areas. "
    "Dropped patches are grey. The picture shows the tokens after the last block."
)
NO_IMAGE = "Choose an image first."


def build_page(demo: DemoModel, *, batch_size: int) -> gradio.Blocks:
    """Return the page for one model; times are measured on batches of `batch_size` images."""
    with gradio.Blocks(
        title=f"elip demo: {demo.dense.name}",
        analytics_enabled=False,
        delete_cache=(SECONDS_OF_UPLOADS, SECONDS_OF_UPLOADS),
    ) as page:
        gradio.Markdown(INTRODUCTION)
        _add_comparison(demo, batch_size)
    return page


def _add_comparison(demo: DemoModel, batch_size: int) -> None:
    """Add the inputs and outputs of `DemoModel.compare` to the page that is being built."""
    choices, has_text = demo.choices, demo.dense.has_text
    with gradio.Row():
        with gradio.Column(scale=1, min_width=260):
            file = gradio.File(label="Image", type="filepath", height=120, elem_id="image")
            choice = gradio.Dropdown(
                choices, value="tome" if demo.saved is None else choices[0], label="Strategy"
            )
            keep = gradio.Slider(
                0.2,
                1.0,
                value=demo.default_keep,
                step=0.05,
                label="Keep",
                info="Share of the tokens, mean over the blocks",
                elem_id="keep",
            )
            captions = gradio.Textbox(
                label="Captions",
                info="One a line. The model ranks them by their similarity to the image.",
                lines=4,
                max_length=10_000,
                visible=has_text,
                elem_id="captions",
            )
            rank = gradio.Button("Rank captions", visible=has_text, elem_id="rank")
        with gradio.Column(scale=3):
            message = gradio.Textbox(
                NO_IMAGE, label="Message", interactive=False, elem_id="message"
            )
            with gradio.Row():
                options = {"format": "png", "interactive": False, "buttons": [], "height": 340}
                picture = gradio.Image(label="Image, as the model reads it", **options)
                merged = gradio.Image(label="Merged tokens", elem_id="merged", **options)
            figures = gradio.Markdown(elem_id="figures")
            shares = gradio.BarPlot(
                x="block",
                y="kept",
                y_lim=[0, 1],
                y_title="share of the patches",
                label="Tokens after each block",
                height=200,
                buttons=[],
                elem_id="shares",
            )
            ranking = gradio.Dataframe(
                label="Captions: cosine with the image",
                headers=["caption", "dense", "reduced"],
                visible=has_text,
                interactive=False,
                elem_id="ranking",
            )

    def show(path: str | None, name: str, share: float, text: str) -> Iterator[dict]:
        """Show the comparison, then the times, which take longer; or a message."""
        outputs = (message, picture, merged, figures, shares, ranking)
        try:
            for found in _results(demo, path, name, share, text, batch_size):
                yield dict(zip(outputs, found, strict=True))
        except (ConfigError, SampleError, TypeError, ValueError) as error:
            yield dict.fromkeys(outputs) | {message: gradio.update(value=str(error), visible=True)}

    gradio.on(
        [file.change, choice.change, keep.change, rank.click],
        show,
        [file, choice, keep, captions],
        [message, picture, merged, figures, shares, ranking],
        trigger_mode="always_last",
        concurrency_limit=1,  # of all visitors, so that times are of one model at a time
        show_progress="minimal",
        api_visibility="private",
    )


def _results(
    demo: DemoModel, path: str | None, choice: str, keep: float, text: str, batch_size: int
) -> Iterator[tuple]:
    """Yield the values of the outputs: without the times, then with them."""
    if path is None:
        raise ConfigError(NO_IMAGE)
    captions = [line.strip() for line in (text or "").splitlines() if line.strip()]
    strategy = demo.strategy(choice, keep)
    pixels = demo.read(Path(path))
    found = demo.compare(pixels, strategy, captions)
    blocks = [str(i + 1) for i in range(len(found.shares))]
    shown = (
        pandas.DataFrame({"block": blocks, "kept": found.shares}),
        [[caption, f"{a:.3f}", f"{b:.3f}"] for caption, a, b in found.ranking],
    )
    hidden = gradio.update(visible=False)
    yield hidden, found.image, found.merged, describe(found, None), *shown
    times = demo.time(pixels, strategy, batch_size)
    yield hidden, found.image, found.merged, describe(found, times), *shown


def describe(found: Comparison, times: Times | None) -> str:
    """Return the figures of an image as a table in Markdown; the times are None until measured."""
    time = "measuring ..."
    if times is not None:
        time = (
            f"dense {times.dense:.1f} ms, reduced {times.reduced:.1f} ms: "
            f"{times.ratio:.2f} of the dense time (batch of {times.batch_size})"
        )
    rows = {
        "strategy": f"`{found.strategy}`",
        "tokens of patches after the last block": f"{found.shares[-1]:.0%}",
        "cosine of the reduced and the dense feature": f"{found.cosine:.4f}",
        "measured time": time,
    }
    body = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"| | |\n|---|---|\n{body}\n\n{LEGEND}"


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
