"""`read_list`: the lists of videos and captions that folders hold, in CSV, also as Excel writes it, and JSONL."""

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple


# Names of columns that are understood, in lower case; the first of both are those of the authors' CSV files.
VIDEO_COLUMNS = ("filename", "file_name", "video", "video_path", "path")
CAPTION_COLUMNS = ("video description", "text", "caption", "prompt")
# And those of what a video follows.
BESIDE_COLUMNS = {
    "audio": ("audio", "audio_path", "audio_file", "sound"),
    "pose": ("pose", "pose_path", "pose_file", "poses"),
}

SUFFIXES = (".csv", ".tsv", ".jsonl")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# Of two of these no word is made; other bytes read as UTF-8 are full of such words.
ALPHABETS = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "SYRIAC", "THAANA", "NKO"}
REMEDY = 'save the list as "CSV UTF-8"'


class Listed(NamedTuple):
    """A video of a list, its caption, `None` where that is missing or empty, and the file of what it follows."""

    video: Path
    caption: str | None
    beside: Path | None = None


def read_captions(
    folder: str | os.PathLike, video_column: str | None = None, caption_column: str | None = None
) -> list[tuple[Path, str | None]]:
    """The videos that a folder's CSV or JSONL file lists, with their captions: as [`read_list`], which see."""
    return [(listed.video, listed.caption) for listed in read_list(folder, video_column, caption_column)]


def read_list(
    folder: str | os.PathLike,
    video_column: str | None = None,
    caption_column: str | None = None,
    condition: str | None = None,
    condition_column: str | None = None,
) -> list[Listed]:
    """The videos that a folder's CSV or JSONL file lists, with their captions, and what they follow.

    The file is `<folder name>.csv`, as the authors have it, or else the only `*.csv`, `*.tsv` or `*.jsonl` of the
    folder. A folder without one may have folders that each have one, as the authors' data does.

    CSV files are separated by commas, semicolons or tabs, whichever make the most columns of the first line, and are
    in UTF-8, or in UTF-16 if they begin with its mark.

    Args:
        folder: The folder; paths in a file are relative to the file.
        video_column, caption_column (`str`, *optional*):
            Their columns; if not given, they are found by name among `VIDEO_COLUMNS` and `CAPTION_COLUMNS`.
        condition (`str`, *optional*): What they follow beside text: "audio" or "pose"; nothing if not given.
        condition_column (`str`, *optional*):
            The column of its files; if not given, found among the `BESIDE_COLUMNS`. A list without one has the sounds
            in the videos themselves; poses need one.

    Raises:
        ValueError: if there is no such file or more than one, if it is malformed or has no such columns, or if a path
            leads out of the folder, or is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder`={str(folder)!r} is not a folder.")
    columns = video_column, caption_column, condition_column
    return [entry for file in _find_lists(folder) for entry in _read_list(file, columns, condition)]


def _find_lists(folder: Path) -> list[Path]:
    """The list of a folder, or those of the folders in it."""
    file = _find_list(folder)
    if file is not None:
        return [file]
    inner = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    files = [_find_list(path) for path in inner]
    found = [file for file in files if file is not None]
    if not found:
        raise ValueError(
            f"`folder`={str(folder)!r} must hold {folder.resolve().name}.csv, or exactly one file *.csv, *.tsv or "
            "*.jsonl, that lists videos and captions, or folders that do; found none."
        )
    without = [path.name for path, file in zip(inner, files, strict=True) if file is None]
    if without:
        raise ValueError(
            f"`folder`={str(folder)!r}: of the folders in it {without} hold no list of videos. Give them one, named "
            "<folder>.csv, or move them elsewhere."
        )
    return found


def _find_list(folder: Path) -> Path | None:
    """The list of a folder, whether its name is in upper or lower case; `None` if it has none."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
    # macOS leaves files with a dot in front beside those that it copies.
    files = [path for path in files if not path.name.startswith(".")]
    name = f"{folder.resolve().name}.csv".lower()
    preferred = [path for path in files if path.name.lower() == name]
    if len(preferred or files) > 1:
        raise ValueError(
            f"`folder`={str(folder)!r} must hold {folder.resolve().name}.csv, or exactly one file *.csv, *.tsv or "
            f"*.jsonl, that lists videos and captions; found {', '.join(path.name for path in files)}."
        )
    return next(iter(preferred or files), None)


def _read_list(file: Path, given: tuple[str | None, str | None, str | None], condition: str | None) -> list[Listed]:
    try:
        read = _read_json if file.suffix.lower() == ".jsonl" else _read_csv
        columns, rows = read(_read_text(file))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as a list of videos: {error}.") from error
    if not rows:
        raise ValueError(f"{file} lists no video.")
    video_column = find_column("video_column", given[0], VIDEO_COLUMNS, columns, file)
    caption_column = find_column("caption_column", given[1], CAPTION_COLUMNS, columns, file)
    beside_column = find_beside(condition, given[2], columns, file)
    listed = []
    for line, row in rows.items():
        where = f"{file}, line {line}:"
        video = file.parent / _check_path(row.get(video_column), f"{where} {video_column!r}", "a video")
        caption = check_caption(row.get(caption_column), f"{where} {caption_column!r}")
        beside = None if condition is None else video
        if beside_column is not None:
            path = _check_path(row.get(beside_column), f"{where} {beside_column!r}", f"the {condition} of a video")
            beside = file.parent / path
        listed.append(Listed(video, caption, beside))
    return listed


def _check_path(path: object, where: str, what: str) -> str:
    if not isinstance(path, str) or not path.strip():
        raise ValueError(f"{where} must be the path of {what}, got {path!r}.")
    path = os.path.normpath(path.strip())
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise ValueError(f"{where} must be a path within the folder of the file, got {path!r}.")
    return path


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        # Which of the many other encodings it is cannot be told from the bytes.
        line = len((content[: error.start] + b".").splitlines())
        raise ValueError(f"line {line} is not in {error.encoding.upper()}; {REMEDY}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"line {line} holds a NUL character; {REMEDY}")
    for foreign in re.finditer(r"[^\x00-\x7f]{2,}", text):
        letters = (letter for letter in foreign[0] if unicodedata.category(letter)[0] in "LM")
        if len(ALPHABETS & {unicodedata.name(letter, "").split(" ")[0] for letter in letters}) > 1:
            line = text.count("\n", 0, foreign.start()) + 1
            raise ValueError(f"line {line}: {foreign[0]!r} mixes alphabets, so the file is not in UTF-8; {REMEDY}")
    return text


def _read_csv(text: str) -> tuple[list[str], dict[int, dict]]:
    """The columns, and the rows by the number of the line on which they begin."""

    def read(separator: str) -> Any:
        return csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)

    def count_columns(separator: str) -> int:
        try:
            return len(next(filter(any, read(separator)), []))
        except csv.Error:
            return 0

    separator = max(SEPARATORS, key=count_columns)
    reader, line = read(separator), 1
    columns: list[str] = []
    rows: dict[int, dict] = {}
    try:
        for fields in reader:
            if len(fields) > len(columns) > 0:
                raise ValueError(f"line {line} has too many fields; quote text with {SEPARATORS[separator]}")
            if not any(fields):
                pass
            elif not columns:
                columns = fields
            else:
                # Excel leaves out the separators of empty fields at the end.
                rows[line] = dict(zip(columns, fields, strict=False))
            line = reader.line_num + 1
    except csv.Error as error:
        quotes = 'a field that begins with a quote ends with one, and those within are doubled: """big"" cat"'
        raise ValueError(f"line {line}: {error}; {quotes}") from error
    return columns, rows


def _read_json(text: str) -> tuple[list[str], dict[int, dict]]:
    """The columns, and the rows by the number of their line."""
    rows = {}
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if line.strip():
            try:
                rows[number] = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(rows[number], dict):
                raise ValueError(f"line {number} is not an object")
    return list(dict.fromkeys(column for row in rows.values() for column in row)), rows


def find_column(
    argument: str, given: str | None, known: tuple[str, ...], columns: list[str], where: str | Path
) -> str:
    """The column that is `given`, or else the first of `known` that there is, in upper or lower case.

    Raises:
        ValueError: if there is none, or more than one of that name.
    """
    if given is not None:
        names, wanted = columns, [given]
    else:
        names, wanted = [column.strip().lower() for column in columns], list(known)
    for name in wanted:
        if names.count(name) > 1:
            raise ValueError(f"{where} has the column {name!r} more than once, in {columns}.")
        if name in names:
            return columns[names.index(name)]
    if given is not None:
        raise ValueError(f"`{argument}`={given!r} is no column of {where}, which has {columns}.")
    raise ValueError(f"{where} has no column named like one of {known}. Set `{argument}` to one of {columns}.")


def find_beside(condition: str | None, given: str | None, columns: list[str], where: str | Path) -> str | None:
    """The column of what videos follow, "audio" or "pose"; `None` for the sounds in the videos themselves.

    Raises:
        ValueError: as [`find_column`] does; sounds need no column.
    """
    if condition is None:
        return None
    known = BESIDE_COLUMNS[condition]
    if condition == "audio" and given is None and not {column.strip().lower() for column in columns} & {*known}:
        return None
    return find_column("condition_column", given, known, columns, where)


def check_caption(value: object, where: str) -> str | None:
    """A caption without spaces around it; `None` if nothing remains. Raises a `ValueError` if it is no text."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r}.")
    return (value or "").strip() or None
