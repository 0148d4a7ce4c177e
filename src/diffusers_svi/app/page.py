"""The page: a new film on one sheet, a film and its timeline on another, and below them all films of the folder."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..color import METHODS
from ..presets import PRESETS
from ..prompts import parse_prompts
from ..start_image import RESIZE_MODES
from . import views
from .project import Project
from .rows import NUM_ROWS, build_rows, first_row, shown_rows, updates
from .settings import MAX_FPS, MAX_FRAMES, MAX_PROMPT, MAX_SIDE, MAX_STEPS, MAX_TITLE, Settings
from .studio import Studio
from .uploads import FOLLOWED, read_followed, read_upload


CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
# A film that has grown goes on where it was being watched.
PLAY_ON = """
let film = '', place = 0, playing = false;
const keep = (event) => { place = event.target.currentTime; playing = !event.target.paused || event.target.ended; };
for (const name of ['play', 'pause', 'timeupdate', 'ended']) element.addEventListener(name, keep, true);
new MutationObserver(() => {
  const video = element.querySelector('video:not([data-known])');
  if (!video) return;
  video.dataset.known = '';
  const path = video.src.split('?')[0];
  if (path !== film) { place = 0; playing = false; }
  video.currentTime = place;
  if (playing) video.play();
  film = path;
}).observe(element, { childList: true, subtree: true });
"""
HEAD = '<meta name="color-scheme" content="light dark">'
# Keeps the film that is shown in the page's address, so that it is there again when the page is loaded again.
REMEMBER = "(name) => { history.replaceState(null, '', name ? '?film=' + encodeURIComponent(name) : '?') }"
SHAPES = dict(zip(("Crop it", "Add black", "Stretch it"), ("crop", "pad", "stretch"), strict=True))
assert set(SHAPES.values()) == set(RESIZE_MODES)

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
AT_ONCE: dict[str, Any] = {**QUIET, "queue": False}
QUEUED: dict[str, Any] = {**QUIET, "concurrency_limit": None}
# By the browser: what is chosen while an answer of the server's is on its way would go too.
TAKE_AWAY: dict[str, Any] = {**QUIET, "js": "() => null"}


def theme() -> gr.Theme:
    """Fonts and colours that are on every machine: nothing is fetched."""
    own = gr.themes.Default(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # Letters that can be read: 4.5 times as bright as their ground, or as dark.
    fill = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_hover": "*primary_800"}
    quiet = ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
    return own.set(
        **fill,
        **{f"{name}_dark": value for name, value in fill.items()},
        **dict.fromkeys(quiet, "*neutral_500"),
        **{f"{name}_dark": "*neutral_400" for name in quiet},
    )


def _plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of people are told to them, not to the log."""

    @functools.wraps(handler)
    def told(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), title="This does not work", print_exception=False) from error

    return told


def build_page(studio: Studio, defaults: Settings, presets: list[str]) -> gr.Blocks:
    """The page of a studio. See [`make_server`]."""
    with gr.Blocks(title="Films · diffusers_svi", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        # The first is the server's: what is looked at is the film that is shown now. The second is for the browser.
        name, address = gr.State(""), gr.Textbox(visible=False)
        seen, turned = gr.State({}), gr.State(0)
        _html('<header class="svi-head"><h1>Films</h1><a class="svi-new" href="?">New film</a></header>')
        with gr.Row(visible=False, elem_classes="svi-sheet") as new_sheet:
            form, make = _new_film(defaults, presets)
        with gr.Row(visible=False, elem_classes="svi-sheet") as film_sheet:
            with gr.Column(scale=6, min_width=320, elem_classes="svi-watch"):
                heading = _html()
                preview = gr.HTML(js_on_load=PLAY_ON)
                state = _html()
                with gr.Row(elem_classes="svi-buttons"):
                    stop = gr.Button("Stop", visible=False, scale=0, min_width=120)
                    go_on = gr.Button("Continue", variant="primary", visible=False, scale=0, min_width=120)
                    download = _html()
                recipe = _html()
            with gr.Column(scale=5, min_width=320, elem_classes="svi-timeline"):
                _html("<h3>Timeline</h3>")
                rows = build_rows()
                with gr.Row(elem_classes="svi-buttons"):
                    back = gr.Button("Clips before", size="sm", visible=False)
                    ahead = gr.Button("Clips after", size="sm", visible=False)
                more = gr.Textbox(
                    label="More clips, one line each",
                    placeholder="the sun sets behind the hills",
                    lines=2,
                    max_lines=8,
                    max_length=MAX_PROMPT * 10,
                )
                extend = gr.Button("Extend the film")
        _html('<h3 class="svi-section">Films in this folder</h3>')
        gallery = _html()
        shown = [new_sheet, film_sheet, heading, preview, state, stop, go_on, download, recipe, back, ahead, gallery]
        parts = [part for row in rows for part in row.parts]

        def look(name: str, address: str, turned: int, seen: dict[str, Any]) -> list[Any]:
            """What has changed since it was `seen`, for `shown`, the `parts` of the rows, `seen` and `name`."""
            if not name and address in {film.name for film in studio.films}:
                name = address  # the server was started anew under an open page
            film = studio.film(name) if name else None
            now = _look(studio, film, turned)
            is_making = film is not None and studio.status(name) in ("making", "stopping")
            clips = shown_rows(film, is_making, turned)
            before, clips_before = seen.get("shown", [None] * len(now)), seen.get("clips", [None] * NUM_ROWS)
            news = [gr.skip() if old == new else _update(new) for old, new in zip(before, now, strict=True)]
            for old, new in zip(clips_before, clips, strict=True):
                news += updates(film, old, new)
            return [*news, {"shown": now, "clips": clips}, name]

        def open_film(request: gr.Request) -> tuple[str, str]:
            wanted = request.query_params.get("film", "")
            if wanted and wanted not in {film.name for film in studio.films}:
                gr.Warning("This film is not in the folder any more.", title="Not found")
                wanted = ""
            return wanted, wanted

        @_plainly
        def make_film(
            image: str | None, followed: str | None, title: str, story: str, *values: Any
        ) -> tuple[str, str]:
            if image is None:
                raise ValueError("Choose the picture that the film begins with.")
            given = dict(zip(SETTING_NAMES, values, strict=True))
            settings = replace(defaults, **{**given, "resize_mode": SHAPES[given["resize_mode"]]})
            film = studio.create(read_upload(image), _story(story, settings), settings, title or "", followed)
            studio.make(film.name)
            return film.name, film.name

        @_plainly
        def extend_film(name: str, story: str) -> str:
            film = studio.film(name)
            film.add(_story(story, film.settings))
            studio.make(name)
            return ""

        # One after the other, so that what is newer comes later.
        looked: dict[str, Any] = {
            "fn": look,
            "inputs": [name, address, turned, seen],
            "outputs": [*shown, *parts, seen, name],
            "concurrency_limit": 1,
            "concurrency_id": "look",
            **QUIET,
        }
        gr.Timer(1).tick(**looked)
        page.load(open_film, None, [name, address], **AT_ONCE).then(**looked)
        made_now = make.click(make_film, form, [name, address], **QUEUED)
        made_now.success(None, address, None, js=REMEMBER, api_visibility="private").then(**looked)
        extend.click(extend_film, [name, more], more, **QUEUED).success(**looked)
        back.click(lambda turned: turned - 1, turned, turned, **AT_ONCE).then(**looked)
        ahead.click(lambda turned: turned + 1, turned, turned, **AT_ONCE).then(**looked)
        edit = _plainly(lambda name, number, prompt: studio.film(name).edit(number, prompt))
        move_up = _plainly(lambda name, number: studio.film(name).move(number, -1))
        remove = _plainly(lambda name, number: studio.film(name).remove(number))
        for row in rows:
            # Not `input`, which is for letters that are typed, and for nothing that is pasted or taken away.
            row.box.change(edit, [name, row.number, row.box], None, trigger_mode="always_last", **AT_ONCE)
            row.up.click(move_up, [name, row.number], None, **AT_ONCE).then(**looked)
            row.cut.click(remove, [name, row.number], None, **AT_ONCE).then(**looked)
        stop.click(_plainly(studio.stop), name, None, **AT_ONCE).then(**looked)
        go_on.click(_plainly(studio.make), name, None, **AT_ONCE).then(**looked)
    return page


# In the order of `_new_film`.
SETTING_NAMES = (
    *("preset", "width", "height", "num_frames", "num_inference_steps", "guidance_scale", "fps", "seed"),
    *("resize_mode", "color_match", "negative_prompt", "endless"),
)


def _new_film(defaults: Settings, presets: list[str]) -> tuple[list[Any], gr.Button]:
    """The sheet on which a film is begun: what `make_film` is given, and its button."""
    with gr.Column(scale=5, min_width=320):
        image = gr.Image(
            label="Start image",
            sources=["upload", "clipboard"],
            type="filepath",
            image_mode=None,
            height=330,
            placeholder="Drop a picture here\n- or -\nclick to choose one",
        )
        # It is looked at before it is opened: what comes is a path in Gradio's own folder. (Not in a class of its own,
        # for which Gradio would write a file beside this one.)
        image.preprocess = lambda payload: None if payload is None else payload.path
        followed = gr.File(height=160, **_followed(defaults.preset))
        followed.preprocess = lambda payload: None if payload is None else payload.path
        preset = gr.Dropdown(
            presets,
            value=defaults.preset,
            label="Preset",
            info=views.about(defaults.preset) if len(presets) > 1 else "as the server was started",
            interactive=len(presets) > 1,
            filterable=False,
        )
    with gr.Column(scale=6, min_width=320):
        title = gr.Textbox(label="Title", placeholder="may be left out", max_length=MAX_TITLE)
        story = gr.Textbox(
            label="Story, one line a clip",
            info="Each clip goes on from the one before. Those to come can be changed while the film is made.",
            placeholder="the kitten wakes and stretches\nit jumps out of the hat\nit walks away over the table",
            lines=7,
            max_lines=16,
            max_length=MAX_PROMPT * 100,
        )
        with gr.Accordion("Advanced settings", open=False):
            with gr.Row():
                width = _number("Width", defaults.width, 16, MAX_SIDE, step=16, placeholder="as the picture")
                height = _number("Height", defaults.height, 16, MAX_SIDE, step=16, placeholder="as the picture")
            with gr.Row():
                frames = _number("Frames a clip (1 + 4n)", defaults.num_frames, 5, MAX_FRAMES, step=4)
                steps = _number("Steps a clip", defaults.num_inference_steps, 1, MAX_STEPS)
            with gr.Row():
                guidance = gr.Number(defaults.guidance_scale, label="Guidance", step=0.5, min_width=120)
                fps = gr.Number(defaults.fps, label="Frames a second", minimum=1, maximum=MAX_FPS, min_width=120)
            with gr.Row():
                seed = _number("Seed", defaults.seed, 0, None)
                shape = gr.Dropdown(
                    [*SHAPES],
                    value=next(iter(SHAPES)),
                    label="Picture of another shape",
                    filterable=False,
                    min_width=120,
                )
            colors = gr.Dropdown(
                [*METHODS],
                value=defaults.color_match,
                label="Keep the colours of the start image",
                info="A remedy for films without an SVI LoRA, whose colours drift",
                filterable=False,
            )
            negative = gr.Textbox(defaults.negative_prompt, label="Not to be seen", lines=3, max_length=MAX_PROMPT)
            endless = gr.Checkbox(defaults.endless, label="Go on with the last line until I stop it")
        make = gr.Button("Make the film", variant="primary", size="lg")

    def published(name: str) -> list[Any]:
        of = Settings.of(name)
        told = gr.Dropdown(info=views.about(name))
        asked = gr.File(value=None, **_followed(name))
        return [told, asked, of.num_frames, of.num_inference_steps, of.guidance_scale, of.fps]

    @_plainly
    def check(path: str | None) -> Any:
        if path is not None:
            read_upload(path)

    @_plainly
    def check_followed(path: str | None, preset: str, fps: float) -> Any:
        name = PRESETS[preset].follows
        if path is not None and name is not None:
            read_followed(name, path, fps)

    preset.input(published, preset, [preset, followed, frames, steps, guidance, fps], **AT_ONCE)
    checked = followed.upload(check_followed, [followed, preset, fps], None, **QUEUED)
    checked.failure(None, None, followed, **TAKE_AWAY)
    image.upload(check, image, None, **QUEUED).failure(None, None, image, **TAKE_AWAY)
    values = [preset, width, height, frames, steps, guidance, fps, seed, shape, colors, negative, endless]
    return [image, followed, title, story, *values], make


def _followed(preset: str) -> dict[str, Any]:
    """How the upload of what films of a preset follow is shown."""
    name = PRESETS[preset].follows
    if name is None:
        return {"visible": False}
    told = {"audio": "Speech: what the film follows, and its sound", "pose": "Poses: a video that the film follows"}
    return {"visible": True, "label": told[name], "file_types": [*FOLLOWED[name]]}


def _look(studio: Studio, film: Project | None, turned: int) -> list[Any]:
    """The values of what the page shows, in the order of its outputs; a truth value is for what is shown or not."""
    if film is None:
        return [True, False, "", "", "", False, False, "", "", False, False, views.gallery(studio, "")]
    status, first = studio.status(film.name), first_row(film, turned)
    return [
        False,
        True,
        views.heading(film, status),
        views.preview(film),
        views.state(film, studio),
        status in ("queued", "making", "stopping"),
        status in ("stopped", "failed", "interrupted"),
        views.download(film, status),
        views.recipe(film),
        first > 0,
        first + NUM_ROWS < len(film.clips),
        views.gallery(studio, film.name),
    ]


def _update(value: Any) -> Any:
    return gr.update(visible=value) if isinstance(value, bool) else value


def _story(text: str | None, settings: Settings) -> list[Any]:
    """The clips of a text, in any of the forms that a file of prompts may have."""
    if not text or not text.strip():
        raise ValueError("Write what happens, one line a clip.")
    return parse_prompts(text, source="The story", num_frames=settings.num_frames, fps=settings.fps)


def _number(label: str, value: int | None, least: int, most: int | None, **options: Any) -> gr.Number:
    return gr.Number(value, label=label, precision=0, minimum=least, maximum=most, min_width=120, **options)


def _html(value: str = "") -> gr.HTML:
    return gr.HTML(value, padding=False)
