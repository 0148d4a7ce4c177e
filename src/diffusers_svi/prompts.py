"""Prompts out of files and texts, read as data: nothing in them is ever executed."""

import ast
import codecs
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks import check_count, check_number
from .clips import ClipSpec
from .schedule import check_line, directed, is_directed, is_segments, sections, segments, spread
from .specs import check_clip


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


def load_prompts(
    path: str | os.PathLike,
    *,
    num_clips: int | None = None,
    num_frames: int = 81,
    fps: float = 16,
    adapters: Sequence[str] | Mapping[str, Any] | None = None,
) -> list[str | ClipSpec]:
    """Read the prompts of a film from a text file: one a clip, or one of the schedules that other tools have.

    What it is, is told by how it begins, in this order:

    1. `[` or `{`: JSON, a list of strings and of objects with the fields of a [`ClipSpec`], in a file of their own or
       as `{"prompts": [...]}`; an object a line (JSONL); `prompt_segments` of diffusers' LTX, a list of
       `{"start_window": 0, "end_window": 2, "text": "..."}`. Images are paths relative to the file. A list may be
       written as in Python too.
    2. `prompts = [...]`: the authors' files, with the same lists.
    3. `;;;` anywhere: sections of musubi's FramePack, `0:a;;;1-2:b;;;-1:c`.
    4. A line that begins with `[/`: Wan2GP's directions, `[/duration=5s,/loras_mult=1;3] prompt`, a line a clip.
    5. A single line with `|`: `a | b`, a clip each, as diffusers' LTX and ComfyUI have it.
    6. Anything else: one prompt a line.

    Empty lines and lines that begin with `#` are left out, and so are those before and after a list. The file is
    UTF-8, or UTF-16 with a byte order mark.

    Args:
        path (`str` or `os.PathLike`): The file.
        num_clips (`int`, *optional*):
            Clips of the film, for sections: those counted from the end need it, and without it they end with the last
            one that is named.
        num_frames (`int`, defaults to 81):
            Frames of a clip, for Wan2GP's `/duration`: it becomes the nearest number of clips, at least one.
        fps (`float`, defaults to 16): Frames a second, for a `/duration` in seconds.
        adapters (`list[str]` or `dict[str, float]`, *optional*):
            Names of the loaded LoRAs in the order of Wan2GP's `/loras_mult`. It holds for its line; the weights of
            other lines are those of the dictionary, or 1.

    Returns:
        `list[str | ClipSpec]`: a string where there is only a prompt, else a `ClipSpec`.

    Raises:
        ValueError: if the file cannot be read as text, holds no prompt, or anything that is not known or looks like
            code; the message names file and line, or the clip.
    """
    options: dict[str, Any] = {"num_clips": num_clips, "num_frames": num_frames, "fps": fps, "adapters": adapters}
    return parse_prompts(_read_text(path), Path(path).parent, source=f"`path`={str(path)!r}", **options)


def parse_prompts(
    text: str,
    folder: str | os.PathLike | None = None,
    *,
    source: str = "`text`",
    num_clips: int | None = None,
    num_frames: int = 81,
    fps: float = 16,
    adapters: Sequence[str] | Mapping[str, Any] | None = None,
) -> list[str | ClipSpec]:
    """Read prompts as [`load_prompts`] does, from a text that is no file.

    Args:
        text (`str`): What could stand in a file.
        folder (`str` or `os.PathLike`, *optional*): What paths of images are relative to; without it they are refused.
        source (`str`, *optional*): What an error calls the text.
        num_clips, num_frames, fps, adapters: As in [`load_prompts`].

    Raises:
        ValueError: as in [`load_prompts`]; the message begins with `source`.
    """
    try:
        num_clips = None if num_clips is None else check_count("num_clips", num_clips, 1)
        check_count("num_frames", num_frames, 1)
        if check_number("fps", fps) <= 0:
            raise ValueError(f"`fps` must be above 0, got {fps!r}.")
        # A line ends where an editor ends it; U+2028 and its like may stand in a prompt.
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        told = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
        told = [(number, line) for number, line in told if line and not line.startswith("#")]
        if told and re.match(r"prompts\s*=|\{|\[(?!\s*/)", told[0][1]):
            prompts = _read_list(lines, told)
        else:
            prompts = _read_lines(told, num_clips, num_frames, fps, adapters)
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("it holds no prompts: there must be at least one, in a list or on a line.")
        return [_clip(item, index, folder) for index, item in enumerate(prompts)]
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _clip(item: Any, index: int, folder: str | os.PathLike | None) -> str | ClipSpec:
    if isinstance(item, dict):
        try:
            item = ClipSpec.from_dict(item, folder)
        except ValueError as error:
            raise ValueError(f"`prompts[{index}]`: {error}") from error
    spec = check_clip(item, index)
    return spec.prompt if spec == ClipSpec(spec.prompt) else spec


def _read_lines(
    told: list[tuple[int, str]],
    num_clips: int | None,
    num_frames: int,
    fps: float,
    adapters: Sequence[str] | Mapping[str, Any] | None,
) -> Any:
    for number, line in told:
        if _CODE.match(line):
            raise ValueError(
                f"line {number} looks like code: {line!r}. Write one prompt a line, or "
                '`prompts = ["...", "..."]` and nothing else.'
            )
        check_line(number, line)
    if any(";;;" in line for _, line in told):
        return sections(told, num_clips)
    if any(is_directed(line) for _, line in told):
        return directed(told, num_frames, fps, adapters)
    if len(told) == 1 and "|" in told[0][1]:
        return spread(*told[0])
    return [line for _, line in told]


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


def _read_list(lines: list[str], told: list[tuple[int, str]]) -> Any:
    """What stands in a text that begins with a list, with an object of JSON or with `prompts =`."""
    # Lines before it are comments, which JSON does not know; so that others keep their numbers they are only emptied.
    first = told[0][0]
    body = "\n".join(["" if number < first else line for number, line in enumerate(lines, start=1)])
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = _read_objects(told) if told[0][1].startswith("{") else _read_literal(body, first)
    if isinstance(value, dict):
        name = next(iter(value)) if len(value) == 1 else None
        value = value[name] if name in ("prompts", "prompt_segments") else [value]
        return segments(value) if name == "prompt_segments" else value
    return segments(value) if is_segments(value) else value


def _read_objects(told: list[tuple[int, str]]) -> list[Any]:
    """JSONL: an object a line."""
    values = []
    for number, line in told:
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"line {number}: this is no JSON ({error}). Write one list, or an object a line, "
                '`{"prompt": "...", "seed": 7}`.'
            ) from error
    return values


def _read_literal(body: str, first: int) -> Any:
    """A list of Python's, on its own or after `prompts =`; other comments in it are Python's too."""
    try:
        statements = ast.parse(body).body
        match statements:
            case [ast.Assign(targets=[ast.Name(id="prompts")], value=node)] | [ast.Expr(value=node)]:
                return ast.literal_eval(node)
        line = statements[-1].lineno
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None) or first
    raise ValueError(
        f"line {line}: this is no list of prompts and nothing else. Write "
        '`prompts = ["...", "..."]`, or one prompt a line.'
    )
