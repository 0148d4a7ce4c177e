"""Prompts out of files, read as data: nothing in a file is ever executed."""

import ast
import codecs
import json
import os
import re
from pathlib import Path

from .inputs import check_clip


# What a film should not show, by the authors of SVI: for `negative_prompt`. Nothing is taken for it by default.
NEGATIVE_PROMPT = (
    "bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
# The same in the words that Wan's models come with.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

# An assignment, an import, a definition, a call that is all of the line, or what is left of a list.
_CODE = re.compile(
    r"""\s*(
        [A-Za-z_][\w.]*(\[[^\]]*\])?\s*[-+*/|&]?=(?!=) |
        import\s+[\w.]+(\s+as\s+\w+)?\s*$ | from\s+[\w.]+\s+import\b |
        (def|class)\s+\w+\s*[(:] | [A-Za-z_][\w.]*\(.*\)\s*;?\s*$ |
        ["'].*["']\s*,?\s*$ | [\[\](){}]+\s*,?\s*$
    )""",
    re.VERBOSE,
)


def load_prompts(path: str | os.PathLike) -> list[str]:
    """Read the prompts of a film from a text file, one a clip.

    Understood are one prompt a line; a list of strings as in JSON or in Python; and the form of the authors' files,
    `prompts = ["...", ...]`. Empty lines and lines that begin with `#` are left out, and so are those before and after
    a list. The file is UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ValueError: if the file cannot be read as text, holds no prompt, or anything that looks like other code; the
            message names file and line.
    """
    text = _read_text(path)
    # A line ends where an editor ends it; U+2028 and its like may stand in a prompt.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    told = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    told = [(number, line) for number, line in told if line and not line.startswith("#")]
    if told and re.match(r"prompts\s*=|\[|\{", told[0][1]):
        prompts = _read_list(path, "\n".join(lines), told[0][0])
    else:
        for number, line in told:
            if _CODE.match(line):
                raise ValueError(
                    f"`path`={str(path)!r}, line {number} looks like code: {line!r}. Write one prompt a line, or "
                    '`prompts = ["...", "..."]` and nothing else.'
                )
        prompts = [line for _, line in told]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"`path`={str(path)!r} holds no prompts: there must be at least one, in a list or on a line.")
    try:
        return [check_clip(prompt, index).prompt for index, prompt in enumerate(prompts)]
    except ValueError as error:
        raise ValueError(f"`path`={str(path)!r}: {error}") from error


def _read_text(path: str | os.PathLike) -> str:
    try:
        content = Path(path).read_bytes()
        is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if is_utf_16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes; save it as UTF-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"`path`={str(path)!r} cannot be read as a text file of prompts: {error}") from error
    return text


def _read_list(path: str | os.PathLike, text: str, first: int) -> object:
    """What stands in a file that begins, on line `first`, with a list or with `prompts =`."""
    # Lines before it are comments, which JSON does not know; so that others keep their numbers they are only emptied.
    lines = text.split("\n")
    body = "\n".join(["" if number < first else line for number, line in enumerate(lines, start=1)])
    try:
        value = json.loads(body)
        return value["prompts"] if isinstance(value, dict) and list(value) == ["prompts"] else value
    except (ValueError, RecursionError):
        pass  # then it is a list of Python's, or nothing
    try:
        statements = ast.parse(body).body
        match statements:
            case [ast.Assign(targets=[ast.Name(id="prompts")], value=node)] | [ast.Expr(value=node)]:
                return ast.literal_eval(node)
        line = statements[-1].lineno
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or first
    raise ValueError(
        f"`path`={str(path)!r}, line {line}: this is no list of strings and nothing else. Write "
        '`prompts = ["...", "..."]`, or one prompt a line.'
    )
