"""Lists of videos as people have them: in the authors' folders, as Excel writes them; what is said of the others."""

import codecs
from pathlib import Path

import pytest

from diffusers_svi.training.lists import read_captions
from small_videos import write_rows


def captions(folder: Path, content: str | bytes, name: str = "list.csv") -> list[str | None]:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [caption for _, caption in read_captions(folder)]


@pytest.mark.parametrize(
    "content",
    [
        "file_name;text\na.mp4;a cat, black\nb.mp4;a dog\n",
        "file_name\ttext\na.mp4\ta cat, black\nb.mp4\ta dog\n",
        '"file_name";"text"\n"a.mp4";"a cat, black"\n"b.mp4";"a dog"\n',
        'file_name,text\na.mp4, "a cat, black"\nb.mp4,  a dog \n',
        'text;file_name;title\n"a cat, black";a.mp4;one\na dog;b.mp4\n',
        'file_name,text\r\na.mp4,"a cat, black"\r\n\r\n,\r\nb.mp4,a dog\r\n',
        'file_name,text\ra.mp4,"a cat, black"\rb.mp4,a dog',
        "\n file_name ; Text\na.mp4;a cat, black\nb.mp4;a dog",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings(tmp_path, content, encoding):
    """Commas, semicolons and tabs; a mark at the start; lines of Windows and of old Macs; rows that say nothing."""
    assert captions(tmp_path, content.encode(encoding)) == ["a cat, black", "a dog"]


@pytest.mark.parametrize(
    "text", ["der Wärter", "猫が眠る", "猫は “Sora”", "кошка спит", "TNFα à 5 µm – l’été", "حصان", "गाय"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_captions_of_all_alphabets(tmp_path, text, encoding):
    assert captions(tmp_path, f"file_name,text\na.mp4,{text}\n".encode(encoding)) == [text]


def test_utf_16_of_both_orders(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        assert captions(tmp_path, mark + "file_name\ttext\na.mp4\t猫\n".encode(encoding)) == ["猫"]


@pytest.mark.parametrize("name", ["LIST.CSV", "list.Csv", "list.tsv", "LIST.JSONL"])
def test_names_in_upper_case(tmp_path, name):
    content = '{"file_name": "a.mp4", "text": "a cat"}' if "JSON" in name else "file_name\ttext\na.mp4\ta cat"
    assert captions(tmp_path, content, name) == ["a cat"]


def test_the_list_of_the_folders_name_in_upper_case(tmp_path):
    write_rows(tmp_path / "cats" / "other.csv", ["video", "text"], ["b.mp4", "b"])
    folder = write_rows(tmp_path / "cats" / "CATS.CSV", ["video", "text"], ["a.mp4", "a"])
    # What macOS leaves beside the files that it copies.
    (folder / "._CATS.CSV").write_bytes(b"\0\5\26\7")
    assert read_captions(folder) == [(folder / "a.mp4", "a")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'file_name,text\na.mp4,a dog\nb.mp4,"big" cat runs\n',
            "line 3: ',' expected after '\"'; a field that begins",
        ),
        ('file_name,text\na.mp4,a dog\n"b.mp4",a cat\nc.mp4,"a cat\nd.mp4,a cow\n', "line 4: unexpected end of data"),
        (
            b"file_name,text\na.mp4,a dog\nb.mp4,the cat\x92s hat\n",
            'line 3 is not in UTF-8; save the list as "CSV UTF',
        ),
        (b"file_name,text\r\na.mp4,a dog\r\nb.mp4,W\xe4rter\r\n", "line 3 is not in UTF-8"),
        (b"file_name,text\ra.mp4,a dog\rb.mp4,W\xe4rter\r", "line 3 is not in UTF-8"),
        ("file_name,text\na.mp4,在草地上奔跑的猫\n".encode("gbk"), "line 2 is not in UTF-8"),
        # These bytes happen to be UTF-8 too.
        (
            "file_name,text\na.mp4,一只猫\n".encode("gbk"),
            "line 2: 'һֻè' mixes alphabets, so the file is not in UTF-8; sav",
        ),
        ("file_name,text\na.mp4,猫が眠る\n".encode("shift-jis"), "line 2 is not in UTF-8"),
        ("file_name,text\na.mp4,кошка\n".encode("cp1251"), "line 2 is not in UTF-8"),
        ("file_name,text\na.mp4,a cat\n".encode("utf-16-le"), "line 1 holds a NUL character; save the list as"),
        ("file_name,text\na.mp4,a c\0at\n", "line 2 holds a NUL character"),
        ("file_name,text\na.mp4,a cat".encode("utf-16")[:-1], "is not in UTF-16"),
        ("file_name;text\na.mp4;a cat; black\n", "line 2 has too many fields; quote text with semicolons"),
        ("file_name\ttext\na.mp4\ta cat\tblack\n", "line 2 has too many fields; quote text with tabs"),
        ('file_name,text\n"a\nb.mp4",a cat\nc.mp4,a,b\n', "line 4 has too many fields; quote text with commas"),
        ("file_name,text,Text\na.mp4,a cat,b\n", "has the column 'text' more than once, in"),
        ("file_name,text,video,video\na.mp4,a cat,b,b\n", None),
        ("file_name,text\n", "lists no video"),
        ("", "lists no video"),
    ],
)
def test_what_cannot_be_told_for_sure(tmp_path, content, message):
    if message is None:
        assert captions(tmp_path, content) == ["a cat"]
        return
    with pytest.raises(ValueError, match="list.csv") as raised:
        captions(tmp_path, content)
    assert message in str(raised.value)


def test_deeply_nested_json(tmp_path):
    with pytest.raises(ValueError, match="list.jsonl cannot be read as a list of videos: line 2 is not JSON: "):
        captions(tmp_path, '{"video": "a.mp4", "text": "a"}\n' + "[" * 100_000, "list.jsonl")


def test_the_folders_of_the_authors(tmp_path):
    """`root/<sub>/<sub>.csv`: the videos of all of them, each beside its list; each list has its own columns."""
    write_rows(tmp_path / "cats" / "cats.csv", ["Filename", "Video Description"], ["a.mp4", "a cat"])
    write_rows(tmp_path / "Dogs" / "dogs.csv", ["file_name", "text"], ["clips/a.mp4", "a dog"], ["b.mp4", ""])
    write_rows(tmp_path / ".cache" / "other.csv", ["nothing"])
    (tmp_path / "readme.txt").touch()
    dogs = [(tmp_path / "Dogs" / "clips" / "a.mp4", "a dog"), (tmp_path / "Dogs" / "b.mp4", None)]
    assert read_captions(tmp_path) == [*dogs, (tmp_path / "cats" / "a.mp4", "a cat")]
    # A list of its own comes first.
    write_rows(tmp_path / "all.csv", ["video", "text"], ["cats/a.mp4", "one cat"])
    assert read_captions(tmp_path) == [(tmp_path / "cats" / "a.mp4", "one cat")]


def test_no_folder_is_left_out_in_silence(tmp_path):
    write_rows(tmp_path / "cats" / "cats.csv", ["video", "text"], ["a.mp4", "a cat"])
    (tmp_path / "dogs").mkdir()
    with pytest.raises(ValueError, match=r"of the folders in it \['dogs'\] hold no list of videos. Give them one"):
        read_captions(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_rows(tmp_path / "dogs" / name, ["video", "text"], ["a.mp4", "a dog"])
    with pytest.raises(ValueError, match="dogs' must hold dogs.csv, or exactly one file .*; found a.csv, b.csv."):
        read_captions(tmp_path)
