"""Schedules of other tools as clips of a film: what is known of them is mapped, everything else is refused.

Each function reads one format, from the numbered lines of a text or from the values in it, and raises a `ValueError`
that names line or place, value and remedy.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from diffusers.utils import logging

from .checks import check_count
from .clips import ClipSpec
from .lora_layers import EXPERTS


logger = logging.get_logger(__name__)

Lines: TypeAlias = Sequence[tuple[int, str]]
# A weight, or one for each expert, by the names of the models that have them.
Weight: TypeAlias = float | dict[str, float]

# A slip of the keyboard should not ask for a film of years: of clips of five seconds these are six days.
MAX_CLIPS = 100_000

_BLOCK = re.compile(r"\[\s*(/[^\]]*)\]\s*")
_COMMAND = re.compile(r"\[\s*/\s*(duration|overlap|new_shot|no_end_image|loras_mult)\b", re.IGNORECASE)
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|%|)", re.IGNORECASE)
_SECTION = re.compile(r"(-?\d{1,9})(?:-(\d{1,9}))?")
_SEGMENT_KEYS = ("start_window", "end_window", "text")
_NEW_SHOT = (
    "a new shot begins with an image here. Write the clips as JSON and give this one its first image: "
    '`{"prompt": "...", "cut": "image.png"}`.'
)
# Commands of Wan2GP that are known, and why they mean nothing here.
_REFUSED = {
    "new_shot": _NEW_SHOT,
    "overlap": "the scheme says how many frames clips overlap, for all of the film. Leave it out, or set "
    "`condition_frames` in the call.",
    "no_end_image": "a clip has an end image only if it says so, as `last_image` in JSON. Leave it out.",
}


def is_directed(line: str) -> bool:
    """Whether a line begins with directions of Wan2GP, `[/...]`."""
    return re.match(r"\[\s*/", line) is not None


def check_line(number: int, line: str) -> None:
    """Refuse macros of Wan2GP, and directions that do not stand in brackets at the beginning."""
    if re.match(r"!\s*\{", line):
        raise ValueError(
            f"line {number} is a macro of Wan2GP, which is not known here: {line!r}. Write out the prompts that it "
            "makes, one a line."
        )
    rest = _split(line)[1]
    if is_directed(rest):
        raise ValueError(f"line {number} has a bracket that is not closed: {line!r}. Write `[/...] prompt`.")
    if inside := _COMMAND.search(rest):
        raise ValueError(f"line {number} has `{inside.group()}` after its beginning. Put it first in the line.")


def _split(line: str) -> tuple[list[str], str]:
    """The directions that a line begins with, each from its slash on, and the rest."""
    commands = []
    while block := _BLOCK.match(line):
        # A comma is part of a value unless another slash follows.
        commands += re.split(r"\s*,\s*(?=/)", block.group(1).strip())
        line = line[block.end() :]
    return commands, line


def directed(
    lines: Lines, num_frames: int, fps: float, adapters: Sequence[str] | Mapping[str, Any] | None
) -> list[ClipSpec]:
    """Lines of Wan2GP, `[/duration=5s,/loras_mult=1;3] prompt`, as clips.

    A duration, in frames or seconds, is rounded to clips of `num_frames`, at least one; where that is a tenth of a
    clip or more off, a warning says so. LoRA weights hold for the line they are in, so that later lines without set
    those of `adapters` again.
    """
    normal = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters or (), 1.0)
    clips, changed = [], False
    for number, line in lines:
        commands, prompt = _commands(number, line)
        if not prompt:
            raise ValueError(f"line {number} has directions but no prompt: {line!r}. Put them on one line.")
        fields: dict[str, Any] = {}
        for name, value in commands.items():
            told = f"line {number}: `/{name}{'' if value is None else '=' + value}`"
            if name == "duration":
                fields["num_clips"] = _duration(told, value, num_frames, fps)
            elif name == "loras_mult":
                fields["lora_weights"], changed = _lora_weights(told, value, list(normal)), True
            elif name == "overlap" and value is not None and value.strip("0") == "":
                raise ValueError(f"{told}: {_NEW_SHOT}")
            elif not (name == "overlap" and value is None):  # which is the default
                unknown = "this is not known. Directions are `/duration` and `/loras_mult`."
                raise ValueError(f"{told}: {_REFUSED.get(name, unknown)}")
        if changed:
            fields.setdefault("lora_weights", normal)
        clips.append(ClipSpec(prompt, **fields))
    return clips


def _commands(number: int, line: str) -> tuple[dict[str, str | None], str]:
    """What the brackets at the beginning of a line say, by name, and the rest of it."""
    told: dict[str, str | None] = {}
    commands, prompt = _split(line)
    for command in commands:
        name, separator, value = command[1:].partition("=")
        name = name.strip().lower()
        if name in told:
            raise ValueError(f"line {number} has `/{name}` twice. Keep one of them.")
        told[name] = value.strip() if separator else None
    return told, prompt


def _duration(told: str, value: str | None, num_frames: int, fps: float) -> int:
    match = _DURATION.fullmatch(value or "")
    if match is None or float(match.group(1)) == 0:
        raise ValueError(f"{told} is no duration. Write frames, `/duration=81`, or seconds, `/duration=5s`.")
    amount, unit = float(match.group(1)), match.group(2).lower()
    if unit == "%":
        raise ValueError(
            f"{told}: nobody knows how long the whole film will be. Write frames, `/duration=81`, or seconds, "
            "`/duration=5s`."
        )
    frames = amount * fps if unit == "s" else amount
    num_clips = max(1, int(frames / num_frames + 0.5))
    if num_clips > MAX_CLIPS:
        raise ValueError(f"{told} is {num_clips} clips, of which there may be {MAX_CLIPS}.")
    if abs(num_clips * num_frames - frames) > 0.1 * num_frames:
        logger.warning(
            f"{told} is {frames:g} frames. A clip has {num_frames}: it becomes {num_clips}, {num_clips * num_frames} "
            "frames."
        )
    return num_clips


def _lora_weights(told: str, value: str | None, adapters: list[str]) -> dict[str, Weight]:
    if not adapters:
        raise ValueError(
            f"{told} has weights by place, and nobody knows of which LoRAs. Name them in that order: "
            '`adapters=["default_0"]`.'
        )
    weights = (value or "").split()
    if len(weights) != len(adapters):
        raise ValueError(f"{told} has {len(weights)} weights, and `adapters` {len(adapters)} names: {adapters}.")
    return {name: _weight(told, weight) for name, weight in zip(adapters, weights, strict=True)}


def _weight(told: str, text: str) -> Weight:
    """`0.8`, or `1;3` for the high-noise and the low-noise expert."""
    if "," in text:
        raise ValueError(f"{told}: weights that change from step to step, {text!r}, are not known. Write one number.")
    numbers = text.split(";")
    if len(numbers) > len(EXPERTS) or not all(re.fullmatch(r"-?\d{0,9}\.?\d{1,9}", number) for number in numbers):
        raise ValueError(
            f"{told}: {text!r} is no weight. Write a number, or `1;3` for the high-noise and the low-noise expert."
        )
    values = [float(number) for number in numbers]
    return values[0] if len(values) == 1 else dict(zip(EXPERTS, values, strict=True))


def spread(number: int, line: str) -> list[str]:
    """`a | b` as one prompt a clip."""
    prompts = [prompt.strip() for prompt in line.split("|")]
    if not all(prompts):
        raise ValueError(f"line {number} has nothing on one side of a `|`: {line!r}. Write `a | b`.")
    return prompts


def sections(lines: Lines, num_clips: int | None) -> list[str]:
    """Sections of musubi's FramePack, `0:a;;;1-2:b;;;-1:c`, as one prompt a clip.

    As there, a negative number counts from the end and goes before others, the last that is said of a section holds,
    and a section of which nothing is said has the prompt of section 0. Without `num_clips` they end with the last one
    that is named.
    """
    text, place = "\n".join(line for _, line in lines), 0
    named: dict[int, str] = {}
    for part in text.split(";;;"):
        number = lines[min(text.count("\n", 0, place + len(part) - len(part.lstrip())), len(lines) - 1)][0]
        place += len(part) + len(";;;")
        for section, prompt in _section(number, " ".join(part.split("\n")).strip(), num_clips):
            named[section] = prompt
    count = num_clips or max(named) + 1
    if 0 not in named:
        named[0] = named[min((section for section in named if section >= 0), default=min(named))]
    return [named.get(section - count, named.get(section, named[0])) for section in range(count)]


def _section(number: int, part: str, num_clips: int | None) -> Iterable[tuple[int, str]]:
    """The sections that a part names, each with its prompt."""
    where, separator, prompt = part.partition(":")
    if not separator:
        where, prompt = "0", part
    match = _SECTION.fullmatch(where.strip())
    if match is None or not prompt.strip():
        raise ValueError(f"line {number}: {part!r} is no section. Write `0:prompt`, `1-2:prompt` or `-1:prompt`.")
    first, last = int(match.group(1)), int(match.group(2) or match.group(1))
    if last < first or (first < 0 and match.group(2)):
        raise ValueError(f"line {number}: `{where.strip()}` is no range of sections. Name them one by one, or `1-2`.")
    if first < 0 and num_clips is None:
        raise ValueError(
            f"line {number}: section `{first}` counts from the end, and nobody knows where that is. Say `num_clips`, "
            "the clips of the film."
        )
    if last >= (num_clips or MAX_CLIPS) or first < -(num_clips or 0):
        raise ValueError(f"line {number}: there is no section `{where.strip()}` in {num_clips or MAX_CLIPS} clips.")
    return [(section, prompt.strip()) for section in range(first, last + 1)]


def is_segments(values: Any) -> bool:
    """Whether a list has what only `prompt_segments` have."""
    return isinstance(values, list) and any(
        isinstance(value, dict) and any(key in value for key in _SEGMENT_KEYS) for value in values
    )


def segments(values: Any) -> list[str]:
    """`prompt_segments` of diffusers' LTX, `[{"start_window": 0, "end_window": 2, "text": "a"}]`, one prompt a clip.

    As there, the last that is said of a window holds, and a window without text has that of the window before; the
    first must have one.
    """
    texts: dict[int, str] = {}
    for index, value in enumerate(values if isinstance(values, list) else [values]):
        where = f"prompt_segments[{index}]"
        if not isinstance(value, dict) or not set(value) <= set(_SEGMENT_KEYS):
            raise ValueError(f"`{where}` must have {', '.join(_SEGMENT_KEYS)} and nothing else, got {value!r}.")
        if not isinstance(value.get("text"), str):
            raise ValueError(f"`{where}.text` must be a string, got {value.get('text')!r}.")
        first = check_count(f"{where}.start_window", value.get("start_window", 0), 0, MAX_CLIPS - 1)
        last = check_count(f"{where}.end_window", value.get("end_window", first), first, MAX_CLIPS - 1)
        texts |= dict.fromkeys(range(first, last + 1), value["text"].strip())
    if not texts.get(0):
        raise ValueError("`prompt_segments` must begin with window 0, and with a text: a clip needs a prompt.")
    prompts: list[str] = []
    for window in range(max(texts) + 1):
        prompts.append(texts.get(window) or prompts[-1])
    return prompts
