"""What the page shows of a film, as HTML. Every text that people typed is escaped."""

from html import escape

from ..conditions.following import CALLED
from ..presets import PRESETS
from .project import Project
from .studio import Progress, Studio


LABELS = {
    "queued": "waiting",
    "making": "being made",
    "stopping": "stopping",
    "failed": "failed",
    "interrupted": "interrupted",
    "done": "done",
    "stopped": "stopped",
}
EMPTY_GALLERY = (
    '<p class="svi-hint">No films yet. The ones you make are kept here, and each can go on at any time.</p>'
)


def title_of(film: Project) -> str:
    return film.title or film.name


def heading(film: Project, status: str) -> str:
    return f'<h2 class="svi-title">{escape(title_of(film))} {_badge(status)}</h2>'


def preview(film: Project) -> str:
    """The film so far; the same film with more clips has another address, so that the browser takes it anew."""
    folder = f"films/{film.name}"
    if not film.num_done:
        return (
            f'<figure class="svi-screen"><img src="{folder}/poster.jpg" alt="Start image of the film">'
            "<figcaption>The film begins with this picture. It grows here, clip by clip.</figcaption></figure>"
        )
    return (
        f'<figure class="svi-screen"><video controls playsinline preload="metadata" poster="{folder}/poster.jpg" '
        f'src="{folder}/film.mp4?v={film.num_frames}" aria-label="The film so far, {clips(film.num_done)}"></video>'
        f"<figcaption>{clips(film.num_done)}, {seconds(film)} s</figcaption></figure>"
    )


def state(film: Project, studio: Studio) -> str:
    """What happens with the film now, and a bar while it is made."""
    status, error = studio.status(film.name), escape(studio.error(film.name))
    done, total = film.num_done, len(film.clips)
    so_far = f"after clip {done} of {total}" if done else "before its first clip"
    told = {
        "queued": _waiting(studio.place(film.name)),
        "stopping": "Stopping. The clip under way is dropped.",
        "failed": f"It could not go on {so_far}. {error}",
        "interrupted": f"The server was stopped {so_far}. Continue makes the rest; nothing is lost.",
        "done": f"Done: {clips(done)}, {seconds(film)} seconds.",
        "stopped": f"Stopped {so_far}. Continue makes the rest.",
    }
    if status == "making":
        return _making(film, studio.progress(film.name))
    kind = "svi-error" if status == "failed" else "svi-state"
    return f'<p class="{kind}" role="status">{told[status]}</p>'


def download(film: Project, status: str) -> str:
    if not film.num_done or status in ("making", "stopping"):
        return ""
    return (
        f'<a class="svi-download" href="films/{film.name}/download" download="{film.name}.mp4">Download the film</a>'
        '<span class="svi-hint">MP4, with how it was made inside</span>'
    )


def recipe(film: Project) -> str:
    """The settings of the film."""
    settings = film.settings
    size = f"{settings.width or 'as the picture'} × {settings.height or 'as the picture'}"
    values = {
        "Preset": settings.preset,
        "Size": "of the picture's shape" if not (settings.width or settings.height) else size,
        "Frames a clip": settings.num_frames,
        "Steps a clip": settings.num_inference_steps,
        "Guidance": f"{settings.guidance_scale:g}",
        "Colours": {"none": "as they come"}.get(settings.color_match, settings.color_match),
        "Frames a second": f"{settings.fps:g}",
        **({} if film.followed is None else {"Follows": _follows(film)}),
        "Seed": settings.seed,
        "Not to be seen": settings.negative_prompt or "nothing is ruled out",
        "Folder": film.folder,
    }
    rows = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f'<details class="svi-recipe"><summary>How it is made</summary><dl>{rows}</dl></details>'


def _follows(film: Project) -> str:
    assert film.followed is not None and film.follows is not None
    return f"{CALLED[film.follows.name]} of {film.followed.num_frames / film.settings.fps:.1f} s"


def gallery(studio: Studio, shown: str) -> str:
    cards = []
    for film in studio.films:
        current = ' aria-current="page"' if film.name == shown else ""
        cards.append(
            f'<a class="svi-card" href="?film={film.name}"{current}>'
            f'<img src="films/{film.name}/poster.jpg" alt="" loading="lazy">'
            f'<span class="svi-card-title">{escape(title_of(film))}</span>'
            f"<span>{film.num_done} of {clips(len(film.clips))} {_badge(studio.status(film.name))}</span></a>"
        )
    return f'<div class="svi-gallery">{"".join(cards)}</div>' if cards else EMPTY_GALLERY


def about(preset: str) -> str:
    """One line on a preset."""
    family = PRESETS[preset]
    return f"{family.num_frames / family.fps:.0f} seconds a clip as published, {family.model.rpartition('/')[2]}"


def clips(number: int) -> str:
    return f"{number} clip{'s' if number != 1 else ''}"


def seconds(film: Project) -> str:
    return f"{film.num_frames / film.settings.fps:.1f}"


def _badge(status: str) -> str:
    return f'<span class="svi-badge svi-{status}">{LABELS[status]}</span>'


def _waiting(before: int) -> str:
    if not before:
        return "Next in the queue."
    return f"Waiting: {before} other film{'s come' if before != 1 else ' comes'} first."


def _making(film: Project, progress: Progress | None) -> str:
    if progress is None:
        told = '<p class="svi-state" role="status">Getting the model ready…</p>'
        return f'{told}<progress aria-label="Progress"></progress>'
    total = max(len(film.clips), progress.clip + 1)
    made = min((progress.clip + progress.step / progress.num_steps) / total, 1)
    left = progress.seconds_left(total)
    time_left = "" if left is None else f"about {_duration(left)} left"
    return (
        f'<p class="svi-state"><span role="status">Making clip {progress.clip + 1} of {total}</span>'
        f"<span>step {progress.step} of {progress.num_steps}</span><span>{time_left}</span></p>"
        f'<progress aria-label="Progress" max="1" value="{made:.3f}"></progress>'
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
