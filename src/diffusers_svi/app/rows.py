"""The timeline as rows: a clip each, always in its place, so that what is typed stays where it is typed."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .project import Project
from .settings import MAX_PROMPT


# At once: a browser has its limits. A longer timeline is turned over.
NUM_ROWS = 24
NUM_PARTS = 5


@dataclass(frozen=True)
class Row:
    """The parts of a row. `number` is never seen: with it the browser says which clip a text is for."""

    row: gr.Row
    number: gr.Number
    box: gr.Textbox
    up: gr.Button
    cut: gr.Button

    @property
    def parts(self) -> list[gr.blocks.Block]:
        return [self.row, self.number, self.box, self.up, self.cut]


@dataclass(frozen=True)
class Shown:
    """What a row shows: the clip `number` of the timeline, at `place`, `state` of it, and whether it can go up."""

    number: int
    place: int
    state: str
    can_go_up: bool


def build_rows() -> list[Row]:
    """Rows that show nothing yet."""
    rows = []
    for _ in range(NUM_ROWS):
        with gr.Row(visible=False, elem_classes="svi-row") as row:
            number = gr.Number(visible=False, precision=0)
            box = gr.Textbox(
                label="Clip",
                placeholder="as in the clip before",
                lines=1,
                max_lines=4,
                max_length=MAX_PROMPT,
                scale=1,
                min_width=180,
                interactive=True,
            )
            up = gr.Button("Move up", size="sm", scale=0, min_width=96)
            cut = gr.Button("Cut", size="sm", scale=0, min_width=72)
        rows.append(Row(row, number, box, up, cut))
    return rows


def first_row(film: Project, turned: int) -> int:
    """The place that the first row shows: the page of the clip that is next, `turned` pages on."""
    last = max(len(film.clips) - 1, 0) // NUM_ROWS
    page = min(film.num_done // NUM_ROWS, last) + turned
    return min(max(page, 0), last) * NUM_ROWS


def shown_rows(film: Project | None, is_making: bool, turned: int) -> list[Shown | None]:
    """What every row shows; `None` for those that are not needed."""
    if film is None:
        return [None] * NUM_ROWS
    first, fixed = first_row(film, turned), film.num_fixed
    rows: list[Shown | None] = []
    for place, entry in enumerate(film.clips[first : first + NUM_ROWS], start=first):
        state = "done" if place < film.num_done else "being made" if place < fixed and is_making else ""
        rows.append(Shown(entry.number, place, state, place > fixed))
    return rows + [None] * (NUM_ROWS - len(rows))


def updates(film: Project | None, before: Shown | None, shown: Shown | None) -> list[dict]:
    """What makes the parts of a row show it, which showed `before`."""
    if before == shown:
        return [gr.skip()] * NUM_PARTS
    if film is None or shown is None:
        return [gr.update(visible=False), *[gr.skip()] * (NUM_PARTS - 1)]
    place, is_open = shown.place + 1, not shown.state
    entry = next((entry for entry in film.clips if entry.number == shown.number), None)
    own = ", ".join(f"own {name}" for name in (entry.spec if entry else ()) if name != "prompt")
    label = " · ".join(filter(None, (f"Clip {place}", own, shown.state)))
    box: dict[str, Any] = {"label": label, "interactive": is_open}
    if before is None or (before.number, before.state) != (shown.number, shown.state):
        # Else somebody may be typing.
        box["value"] = entry.prompt if entry else ""
    return [
        gr.update(visible=True),
        gr.update(value=shown.number),
        gr.update(**box),
        gr.update(value=f"Move {place} up", visible=is_open, interactive=shown.can_go_up),
        gr.update(value=f"Cut {place}", visible=is_open),
    ]
