"""Many films, dealt out to the processes of `accelerate launch`."""

import gc
import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..pipeline import SVIPipeline
from .making import check, make
from .order import TYPED, Order, order


# Processes wait for one another at the end, for as long as the longest film takes.
PATIENCE = timedelta(days=365)


def make_all(path: Path, command: click.Command, options: Mapping[str, Any], *, dry_run: bool) -> None:
    """Make the films of a file, one JSON object a line: options of `generate` by name, `out` among them.

    What a line leaves out is as in `options`. All lines are checked before the first model is loaded. A film that
    fails is told and the others go on.

    Raises:
        click.ClickException: if a line is not right, or a film failed.
    """
    state = PartialState(cpu=options["device"] == "cpu", timeout=PATIENCE)
    films, problems = _read(path, command, options)
    mine = [one for number, one in enumerate(films) if number % state.num_processes == state.process_index]
    for number, film in mine:
        try:
            with film.writer() as writer:
                check(film.of_state(writer.state), writer)
        except (click.ClickException, ValueError, OSError) as error:
            problems.append(_told(path, number, error))
    problems = sorted(set(gather_object(problems)))
    failed = [] if problems else gather_object(_make(mine, path, state, dry_run))
    state.destroy_process_group()
    # Where one process ends with an error `torchrun` kills the others of the machine, which may have more to tell.
    if not state.is_local_main_process:
        return
    if problems:
        raise click.ClickException("\n".join(problems))
    click.echo(f"{path}: {len(films) - len(failed)} of {len(films)} films.")
    if failed:
        raise click.ClickException("\n".join(["Not made:", *failed]))


def _make(films: list[tuple[int, Order]], path: Path, state: PartialState, dry_run: bool) -> list[str]:
    """Make these, and tell those that failed."""
    failed: list[str] = []
    loaded: dict[str, SVIPipeline] = {}
    for number, film in films:

        def load(film: Order = film) -> SVIPipeline:
            known = str((film.load.args, film.load.keywords))
            if known not in loaded:
                # Before the next one takes its place.
                loaded.clear()
                gc.collect()
                device = film.load.keywords["device"] or state.device
                loaded[known] = film.load(device=device)
            if state.num_processes > 1:
                # Which of the films that are made at the same time is told of.
                loaded[known].set_progress_bar_config(desc=str(film.out))
            return loaded[known]

        try:
            make(film, load, dry_run=dry_run)
        except (click.ClickException, ValueError, OSError, FloatingPointError, RuntimeError) as error:
            failed.append(_told(path, number, error))
            click.echo(failed[-1], err=True)
            if isinstance(error, torch.OutOfMemoryError):
                loaded.clear()
    return failed


def _read(path: Path, command: click.Command, options: Mapping[str, Any]) -> tuple[list[tuple[int, Order]], list[str]]:
    """The films with the numbers of their lines, and what is wrong with lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        return [], [f"`--jobs` {str(path)!r} cannot be read: {error}"]
    films: list[tuple[int, Order]] = []
    problems, outs = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            film = order({**options, **_options(command, line)})
            if film.prompts is None:
                raise ValueError(f"prompts cannot be typed ({TYPED!r}) for several films.")
            for made in filter(None, (film.out, film.finalize)):
                if made.resolve() in outs:
                    raise ValueError(f"another line makes {str(made)!r} as well.")
                outs.add(made.resolve())
            films.append((number, film))
        except (click.ClickException, ValueError, OSError) as error:
            problems.append(_told(path, number, error))
    if not films and not problems:
        problems.append(f"`--jobs` {str(path)!r} holds no films: there must be one a line.")
    return films, problems


def _options(command: click.Command, line: str) -> dict[str, Any]:
    """The options that a line tells, as the command line would have them."""
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply.") from error
    if not isinstance(values, dict) or "out" not in values:
        raise ValueError("a line is an object of options, with `out` among them.")
    known = {parameter.opts[0].removeprefix("--"): parameter for parameter in command.params}
    arguments = []
    for name, value in values.items():
        if name not in known or name in ("jobs", "dry_run", "recipe"):
            raise ValueError(f"there is no option {name!r} for a film.")
        if known[name].is_flag:  # type: ignore[attr-defined]
            arguments += [f"--{name}"] if value else []
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                arguments.append(f"--{name}={one}")
    context = command.make_context(command.name, arguments)
    given = {parameter.name for name, parameter in known.items() if name in values}
    return {str(name): value for name, value in context.params.items() if name in given}


def _told(path: Path, number: int, error: Exception) -> str:
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    return f"{path}, line {number}: {message}"
