"""Figures for people: a table, a verdict in plain words, and a picture."""

from pathlib import Path
from typing import Any

from .contestants import BASE, LORA
from .figures import LESS, Figures
from .kinds import all_errors
from .statistics import Interval, counted


_TITLES = {"slope": "all that is carried", "colour_slope": "its colours"}
_COLUMN = 21
_COLOURS = {BASE: "tab:gray", LORA: "tab:blue"}


def table(figures: Figures) -> str:
    """Slopes of every error, with intervals of 95%, of all that is carried and of its colours."""
    summary = figures.summary
    lines = []
    for of, title in _TITLES.items():
        heads = "".join(f"{name:{_COLUMN}}" for name in summary)
        lines += [f"{title:24}{'in':9}{heads}".rstrip()]
        for error in all_errors():
            rows = {name: errors[str(error)] for name, errors in summary.items() if str(error) in errors}
            if rows:
                went_in = next(iter(rows.values()))["in"]["value"]
                # No colour went in, or too little of it, where nobody has a slope.
                cells = "".join(f"{_cell(rows[name][of], name):{_COLUMN}}" for name in summary if name in rows)
                lines.append(f"{error!s:18}{error.value:5g} {went_in:<9.4f}{cells}".rstrip())
        lines.append("")
    return "\n".join(lines)


def verdict(figures: Figures) -> str:
    """What the intervals say, counted: a line for all that is carried, and one for its colours."""
    summary, lines = figures.summary, []
    for of, title in _TITLES.items():
        told = []
        for name in (BASE, LORA):
            if name in summary:
                count, shrunk, grown = counted([found[of] for found in summary[name].values()], 1)
                who = "the LoRA" if name == LORA else "the base"
                told.append(f"of {count} errors {who} shrinks {shrunk} and lets {grown} grow")
        if LESS in summary:
            _, less, more = counted([found[of] for found in summary[LESS].values()], 0)
            told.append(f"the LoRA leaves less than the base of {less} and more of {more}")
        lines.append(f"{title}: {'; '.join(told)}.")
    samples = max(found["in"]["n"] for errors in summary.values() for found in errors.values() if "in" in found)
    how = "by whole intervals of 95%" if samples > 1 else "by value, as one sample has no interval"
    return "\n".join([*lines, f"({samples} {'samples' if samples > 1 else 'sample'}, counted {how}.)"])


def _cell(one: Interval, name: str) -> str:
    if one["value"] is None:
        return "-"
    sign = "+" if name == LESS else ""
    spread = "" if one["low"] is None else f" ({one['low']:{sign}.2f} to {one['high']:{sign}.2f})"
    return f"{one['value']:{sign}.2f}{spread}"


def check_plot() -> None:
    """Raise a `ValueError` if there is nothing to draw with."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            'The plot needs a package that is not installed: `pip install "diffusers_svi[demo]"`, or matplotlib. '
            "Or leave the plot out, with `--without_plot`."
        ) from error


def plot(figures: Figures, path: Path) -> None:
    """Draw the slopes of every error with their intervals, and a line at 1, where an error stays as it is."""
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary = figures.summary
    names = [name for name in (BASE, LORA) if name in summary]
    shown = [error for error in all_errors() if any(str(error) in summary[name] for name in names)]
    figure = Figure(figsize=(10, 1.6 + 0.26 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(_TITLES), sharey=True)
    for axis, (of, title) in zip(axes, _TITLES.items(), strict=True):
        for place, name in enumerate(names):
            for row, error in enumerate(shown):
                one = summary[name].get(str(error), {}).get(of)
                if one is not None and one["value"] is not None:
                    low, high = (one["value"] if one[end] is None else one[end] for end in ("low", "high"))
                    height = row + 0.3 * (place - (len(names) - 1) / 2)
                    axis.plot([low, high], [height, height], color=_COLOURS[name], linewidth=1.5)
                    axis.plot(one["value"], height, "o", color=_COLOURS[name], markersize=4)
            axis.plot([], [], "o-", color=_COLOURS[name], label="with the LoRA" if name == LORA else "without")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("shrinks   |   slope: out over in   |   grows", fontsize=9)
        axis.set_xlim(left=0)
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_yticks(range(len(shown)), [f"{error} ({error.value:g})" for error in shown], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8)
    figure.suptitle(figures.scheme, fontsize=10)
    figure.savefig(path, dpi=100)
