"""The page of the app: tabs to draw, edit, ask, look into the ladder and compare, by Gradio."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from experiments.ui.ladder import (
    compute_attention,
    draw_weighted,
    list_taps,
    measure_mix,
    measure_norms,
    overlay,
    plot_heat,
)
from experiments.ui.studio import MAX_SEED, Studio
from tbac.pictures import open_picture, to_upright_rgb
from tbac.sampling.recipe import Recipe

# One drawing at a time, whoever asks: others wait in the queue, and each gets its own results.
QUEUED: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#draw-picture img, #edit-picture img {width: 100%; height: 100%; object-fit: contain}
"""  # small pictures are shown large


class Settings:
    """The inputs that every kind of drawing has, in an accordion.

    Args:
        studio: whose sizes are offered.
        defaults: of the sliders, by the options' names.
        edit: whether there is an image guidance and the size follows the input image.
    """

    def __init__(self, studio: Studio, defaults: dict[str, Any], edit: bool = False) -> None:
        own = [f"{width} x {height}" for width, height in studio.list_sizes()]
        with gr.Row():
            self.seed = gr.Number(42, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, scale=1)
            self.again = gr.Button("New seed", scale=0, min_width=120, size="sm")
        with gr.Accordion("Settings", open=False):
            self.negative = gr.Textbox("", label="Negative prompt", info="What the picture is led away from.")
            self.steps = gr.Slider(
                1, 100, defaults["num_inference_steps"], step=1, label="Steps", info="More are slower and more exact."
            )
            self.guidance = gr.Slider(
                1, 10, defaults["guidance_scale"], step=0.1, label="Guidance", info="How strictly the text is followed."
            )
            self.image_guidance = gr.Slider(
                1, 5, defaults["image_guidance_scale"], step=0.1, label="Image guidance", visible=edit,
                info="How strictly the input images are followed; 1 turns it off.",
            )  # fmt: skip
            choices = ["as the input image", *own] if edit else own
            self.size = gr.Dropdown(choices, value=choices[0], label="Size", info="Width x height in pixels.")
        self.again.click(lambda: random.randint(0, MAX_SEED), None, self.seed, queue=False)
        self.inputs = [self.seed, self.negative, self.steps, self.guidance, self.image_guidance, self.size]


def make_recipe(prompt: str, values: tuple[Any, ...], size: tuple[int, int] | None = None) -> Recipe:
    """Make a recipe of what stands in the page.

    Args:
        prompt: the text.
        values: of `Settings.inputs`.
        size: (width, height) where the page leaves it to the input image.
    """
    seed, negative, steps, guidance, image_guidance, named = values
    if not prompt or not prompt.strip():
        raise gr.Error("Write what should be drawn.")
    if seed is None or not 0 <= int(seed) <= MAX_SEED:
        raise gr.Error(f"The seed must be a whole number from 0 to {MAX_SEED}.")
    width, height = size or (int(number) for number in named.split(" x "))
    return Recipe(
        prompt.strip(),
        negative_prompt=negative or "",
        seed=int(seed),
        num_inference_steps=int(steps),
        guidance_scale=float(guidance),
        image_guidance_scale=float(image_guidance),
        height=height,
        width=width,
    )


def show_errors(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Show a mistake of the user in the page, in the words of the error."""

    def run(*values: Any) -> Iterator[Any]:
        try:
            yield from work(*values)
        except ValueError as error:
            raise gr.Error(str(error)) from None

    return run


def make_command_box(name: str) -> gr.Code:
    """Make the box for the command that draws a picture again."""
    label = "Draws it again, to the byte"
    return gr.Code(label=label, language="shell", show_line_numbers=False, wrap_lines=True, elem_id=name)


def start_by(button: gr.Button, field: gr.Textbox, work: Any, inputs: list[Any], outputs: list[Any]) -> list[Any]:
    """Start a drawing by a button, or by Enter in a field; returns what stopping cancels."""
    return [event(work, inputs, outputs, **QUEUED) for event in (button.click, field.submit)]


def build_page(studio: Studio, examples: list[str], defaults: dict[str, Any]) -> gr.Blocks:
    """Build the page.

    Args:
        studio: the model.
        examples: prompts to begin with.
        defaults: `num_inference_steps`, `guidance_scale`, `image_guidance_scale` and `against`.
    """
    with gr.Blocks(title="UniImage", analytics_enabled=False) as page:
        gr.Markdown(f"# UniImage\n`{studio.checkpoint}`, model {studio.fingerprint}")
        with gr.Tabs():
            with gr.Tab("Draw"):
                build_draw(studio, examples, defaults)
            with gr.Tab("Edit"):
                build_edit(studio, defaults)
            with gr.Tab("Ask"):
                build_ask(studio)
            with gr.Tab("Ladder"):
                build_ladder(studio, examples, defaults)
            with gr.Tab("Compare"):
                build_compare(studio, examples, defaults)
    return page


def build_draw(studio: Studio, examples: list[str], defaults: dict[str, Any]) -> None:
    # What is asked for on the left, what was drawn on the right.
    with gr.Row():
        with gr.Column(min_width=300):
            prompt = gr.Textbox(label="Prompt", lines=2, elem_id="draw-prompt")
            settings = Settings(studio, defaults)
            with gr.Row():
                start = gr.Button("Draw", variant="primary", elem_id="draw-start")
                stop = gr.Button("Stop", elem_id="draw-stop")
            gr.Examples([[text] for text in examples], prompt)
        with gr.Column(min_width=300):
            picture = gr.Image(label="Picture", format="png", interactive=False, height=460, elem_id="draw-picture")
            state = gr.Markdown(elem_id="draw-state")
            command = make_command_box("draw-command")

    @show_errors
    def draw(text: str, *values: Any) -> Iterator[Any]:
        yield gr.skip(), "step 0", ""
        for progress in studio.draw(make_recipe(text, values)):
            if progress.path is None:
                yield progress.picture, f"step {progress.step} of {progress.steps}", ""
            else:
                yield str(progress.path), "done", studio.get_command(progress.path)

    running = start_by(start, prompt, draw, [prompt, *settings.inputs], [picture, state, command])
    stop.click(lambda: "stopped", None, state, cancels=running, queue=False)


def build_edit(studio: Studio, defaults: dict[str, Any]) -> None:
    # Input images and what should change on the left, before and after on the right.
    with gr.Row():
        with gr.Column(min_width=300):
            sources = gr.Gallery(
                label="Input images", type="filepath", interactive=True, columns=3, height=220, elem_id="edit-inputs"
            )
            prompt = gr.Textbox(label="What should change", lines=2, elem_id="edit-prompt")
            settings = Settings(studio, defaults, edit=True)
            with gr.Row():
                start = gr.Button("Edit", variant="primary", min_width=80, elem_id="edit-start")
                stop = gr.Button("Stop", min_width=80)
                onward = gr.Button("Go on with the result", min_width=100, elem_id="edit-onward")
        with gr.Column(min_width=300):
            slider = gr.ImageSlider(
                label="Before and after", type="pil", interactive=False, height=460, elem_id="edit-picture"
            )
            state = gr.Markdown(elem_id="edit-state")
            command = make_command_box("edit-command")
    result = gr.State()

    @show_errors
    def edit(items: list[Any] | None, text: str, *values: Any) -> Iterator[Any]:
        if not items:
            raise gr.Error("Give an image to edit.")
        paths = [studio.keep_input(item[0] if isinstance(item, tuple) else item) for item in items]
        before = open_picture(paths[0])
        size = studio.choose_size(before) if values[-1] == "as the input image" else None
        yield gr.skip(), "step 0", "", None
        for progress in studio.draw(replace(make_recipe(text, values, size), images=tuple(paths))):
            shown = (before.resize(progress.picture.size), progress.picture)
            if progress.path is None:
                yield shown, f"step {progress.step} of {progress.steps}", "", None
            else:
                yield shown, "done", studio.get_command(progress.path), str(progress.path)

    def go_on(path: str | None) -> list[str]:
        if path is None:
            raise gr.Error("There is no result yet.")
        return [path]

    inputs, outputs = [sources, prompt, *settings.inputs], [slider, state, command, result]
    running = start_by(start, prompt, edit, inputs, outputs)
    stop.click(lambda: "stopped", None, state, cancels=running, queue=False)
    onward.click(go_on, result, sources, queue=False)


def build_ask(studio: Studio) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            image = gr.Image(label="Image", type="pil", sources=["upload", "clipboard"], elem_id="ask-image")
            question = gr.Textbox(label="Question", elem_id="ask-question")
            longest = gr.Slider(8, 512, 64, step=8, label="Longest answer", info="In tokens.")
            start = gr.Button("Ask", variant="primary", elem_id="ask-start")
        answer = gr.Textbox(label="Answer of the untouched language model", lines=6, elem_id="ask-answer")

    @show_errors
    def ask(picture: Image.Image | None, text: str, tokens: float) -> Iterator[str]:
        if not text or not text.strip():
            raise gr.Error("Write a question.")
        upright = None if picture is None else to_upright_rgb(picture)
        yield studio.pipeline.answer(text.strip(), upright, int(tokens))

    start_by(start, question, ask, [image, question, longest], [answer])


def build_ladder(studio: Studio, examples: list[str], defaults: dict[str, Any]) -> None:
    model = studio.pipeline.model
    taps = list_taps(model)
    # Which taps are on and which query is looked at on the left, pictures and heat maps on the right.
    with gr.Row():
        with gr.Column(min_width=300):
            prompt = gr.Textbox(examples[0] if examples else "", label="Prompt", lines=2, elem_id="ladder-prompt")
            settings = Settings(studio, defaults)
            chosen = gr.CheckboxGroup(taps, value=taps, label="Taps that are on", elem_id="ladder-taps")
            weight = gr.Slider(0, 2, 0, step=0.1, label="Weight of the others", info="0 switches them off.")
            with gr.Row():
                start = gr.Button("Draw with these", variant="primary", elem_id="ladder-start")
                each = gr.Button("Each one off in turn", elem_id="ladder-each")
            query = gr.Slider(
                0, len(model.ladder.queries) - 1, 0, step=1, label="Query", info="Whose readers are shown."
            )
            with gr.Row():
                look = gr.Button("Where the picture reads it", elem_id="ladder-look")
                norms = gr.Button("Norms of the contexts", elem_id="ladder-norms")
        with gr.Column(min_width=300):
            gallery = gr.Gallery(label="Same noise", columns=3, format="png", elem_id="ladder-pictures")
            heat = gr.Image(label="Heat map", interactive=False, elem_id="ladder-heat")

    @show_errors
    def draw(text: str, kept: list[str], value: float, *values: Any) -> Iterator[Any]:
        recipe = make_recipe(text, values)
        weights = [1.0 if tap in kept else float(value) for tap in taps]
        whole = draw_weighted(studio.pipeline, recipe, [1.0] * len(taps))
        yield [(whole, "all on")]
        yield [(whole, "all on"), (draw_weighted(studio.pipeline, recipe, weights), "these on")]

    @show_errors
    def draw_each(text: str, *values: Any) -> Iterator[Any]:
        recipe = make_recipe(text, values)
        shown = [(draw_weighted(studio.pipeline, recipe, [1.0] * len(taps)), "all on")]
        yield shown
        for off, tap in enumerate(taps):
            weights = [0.0 if index == off else 1.0 for index in range(len(taps))]
            shown = [*shown, (draw_weighted(studio.pipeline, recipe, weights), f"{tap.split(':')[0]} off")]
            yield shown

    @show_errors
    def show_attention(text: str, number: float, *values: Any) -> Iterator[Any]:
        recipe = make_recipe(text, values)
        picture = draw_weighted(studio.pipeline, recipe, [1.0] * len(taps))
        maps = compute_attention(studio.pipeline, recipe, int(number))
        yield [(picture, "picture"), *((overlay(picture, one), tap) for one, tap in zip(maps, taps, strict=True))]

    @show_errors
    def show_norms(text: str) -> Iterator[Any]:
        yield plot_heat(measure_norms(model, text), "Root mean square of each context", taps, "query")

    # Each button shows something else of the same prompt and noise.
    asked = [prompt, *settings.inputs]
    start.click(draw, [prompt, chosen, weight, *settings.inputs], gallery, **QUEUED)
    each.click(draw_each, asked, gallery, **QUEUED)
    look.click(show_attention, [prompt, query, *settings.inputs], gallery, **QUEUED)
    norms.click(show_norms, prompt, heat, **QUEUED)
    if model.ladder.plan.mixed:
        mix = gr.Button("Learned mixes")
        layers = [f"layer {layer}" for layer in model.ladder.plan.layers]

        def show_mix(text: str) -> Image.Image:
            return plot_heat(measure_mix(model, [text]), f"Share of each layer: {', '.join(layers)}", taps, "layer")

        mix.click(show_mix, prompt, heat, **QUEUED)


def build_compare(studio: Studio, examples: list[str], defaults: dict[str, Any]) -> None:
    other = gr.Textbox(defaults["against"] or "", label="Other checkpoint", elem_id="compare-checkpoint")
    prompts = gr.Textbox("\n".join(examples), label="Prompts, one a line", lines=4, elem_id="compare-prompts")
    settings = Settings(studio, defaults)
    start = gr.Button("Compare", variant="primary", elem_id="compare-start")
    gallery = gr.Gallery(label="Left this model, right the other; same noise", columns=2, format="png")

    @show_errors
    def compare(checkpoint: str, text: str, *values: Any) -> Iterator[Any]:
        if not checkpoint or not checkpoint.strip():
            raise gr.Error("Name another checkpoint.")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        recipe = make_recipe(lines[0] if lines else "", values)
        shown: list[tuple[Image.Image, str]] = []
        for prompt, mine, theirs in studio.compare(checkpoint.strip(), lines, recipe):
            shown = [*shown, (mine, f"this: {prompt}"), (theirs, f"other: {prompt}")]
            yield shown

    start.click(compare, [other, prompts, *settings.inputs], gallery, **QUEUED)


def serve(page: gr.Blocks, port: int, share: bool, folder: Path) -> None:
    """Serve the page on this machine's own address until the process ends.

    Args:
        page: what `build_page` returned.
        port: of 127.0.0.1.
        share: ask Gradio for a public address as well.
        folder: whose pictures the page may show.

    Raises:
        ValueError: when the port is taken.
    """
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        page.queue(max_size=64).launch(
            server_name="127.0.0.1", server_port=port, share=share, allowed_paths=[str(folder.resolve())],
            theme=theme, css=CSS, footer_links=[], show_error=True,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"port={port} can't be used ({error}); give another") from None
