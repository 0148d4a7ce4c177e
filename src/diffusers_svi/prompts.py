"""Prompts out of files."""

import ast
import os
from pathlib import Path

from .inputs import check_clip


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
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"`path`={str(path)!r} must hold at least one prompt, as a list or one a line.")
    return [check_clip(prompt, index).prompt for index, prompt in enumerate(prompts)]
