"""Prompts of a film: one for every clip."""

import ast
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .checks import check_count


def load_prompts(path: str | os.PathLike) -> list[str]:
    """Read prompts from a text file, as data: nothing in the file is ever executed.

    Two forms are understood: one prompt a line, empty lines left out; and the form of the authors' files,
    `prompts = ["...", ...]`, of which only the list of strings is read.

    Raises:
        ValueError: if the file cannot be read as text, holds no prompt, or holds other code.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`path`={str(path)!r} cannot be read as a text file of prompts: {error}") from error
    if text.lstrip().startswith(("prompts=", "prompts =")):
        try:
            prompts = ast.literal_eval(text.lstrip().split("=", 1)[1].strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(
                f"`path`={str(path)!r} begins with `prompts =` but no list of strings follows. Write "
                '`prompts = ["...", "..."]`, or one prompt a line.'
            ) from error
    else:
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    return check_prompts(prompts)


def check_prompts(prompts) -> list[str]:
    """`prompts` as a list, or a `ValueError` that says what is wrong with it."""
    if not isinstance(prompts, (list, tuple)) or len(prompts) == 0:
        raise ValueError(f"`prompts` must be a string or a list of at least one string, got {prompts!r}.")
    for index, prompt in enumerate(prompts):
        check_prompt(prompt, index)
    return list(prompts)


def check_prompt(prompt, index: int) -> str:
    """`prompt`, or a `ValueError` naming clip `index` if it is not a string with something in it."""
    if not isinstance(prompt, str):
        raise ValueError(f"`prompts[{index}]` must be a string, got {type(prompt).__name__}: {prompt!r}.")
    if not prompt.strip():
        raise ValueError(f"`prompts[{index}]` is empty. Describe what happens in clip {index}, or leave it out.")
    return prompt


def check_film(
    prompts: str | Iterable[str] | None, prompt_embeds: torch.Tensor | None, num_clips: int | None
) -> tuple[Iterable, int | None]:
    """What to iterate over for the prompts of a film, and the number of its clips if it is known."""
    if (prompts is None) == (prompt_embeds is None):
        raise ValueError(
            "Pass either `prompts` or `prompt_embeds`: " + ("none" if prompts is None else "both") + " is given."
        )
    if prompt_embeds is not None:
        if not isinstance(prompt_embeds, torch.Tensor) or prompt_embeds.ndim != 3 or len(prompt_embeds) == 0:
            raise ValueError(
                "`prompt_embeds` must be a tensor (clips, sequence_length, dim) with a row for every clip."
            )
        prompts = prompt_embeds
    elif isinstance(prompts, str):
        prompts = check_prompts([prompts])
    elif isinstance(prompts, (list, tuple)):
        prompts = check_prompts(prompts)
    elif not isinstance(prompts, Iterable):
        raise ValueError(f"`prompts` must be a string, a list of strings or an iterator of strings, got {prompts!r}.")
    if num_clips is not None:
        check_count("num_clips", num_clips, 1)
    if hasattr(prompts, "__len__"):
        if num_clips is not None and num_clips < len(prompts):
            raise ValueError(
                f"`num_clips`={num_clips} leaves out some of the {len(prompts)} prompts. Give no more prompts than "
                "clips."
            )
        num_clips = num_clips or len(prompts)
    return prompts, num_clips


def one_per_clip(prompts: Iterable, num_clips: int | None) -> Iterator:
    """The prompts of a chain, one a clip; the last one holds when there are more clips than prompts.

    With `num_clips=None` it ends with `prompts`, which may be endless.
    """
    if num_clips is None:
        yield from prompts
        return
    last = None
    for last in itertools.islice(prompts, num_clips):
        yield last
        num_clips -= 1
    yield from itertools.repeat(last, num_clips)
