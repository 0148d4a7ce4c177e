import pytest

from diffusers_svi import load_prompts


LIST = 'prompts = [\n    "a cat sits",\n    "a dog jumps",\n]\n'
TWO = ["a cat sits", "a dog jumps"]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize(
    "content",
    [
        b"a cat sits\n\n  a dog jumps \n",
        b"\xef\xbb\xbfa cat sits\r\na dog jumps\r\n",
        b"a cat sits\ra dog jumps",
        b"# scene 1\na cat sits\n  # scene 2\na dog jumps\n",
        "a cat sits\r\na dog jumps\r\n".encode("utf-16"),
        b"\xfe\xff" + "a cat sits\na dog jumps".encode("utf-16-be"),
        LIST.encode(),
        b"\xef\xbb\xbf" + LIST.encode(),
        b"# the film of the cat\n\n" + LIST.encode() + b"# the end\n",
        LIST.replace("prompts =", "prompts   =").encode(),
        b"prompts=['a cat sits', # the first\n 'a dog jumps',]",
        b'["a cat sits", "a dog jumps"]',
        b'# JSON\n[\n"a cat sits",\n"a dog jumps"\n]',
        b"['a cat sits', 'a dog jumps']\n",
        b'{"prompts": ["a cat sits", "a dog jumps"]}',
    ],
)
def test_every_form_gives_the_same_prompts(file, content):
    file.write_bytes(content)
    assert load_prompts(file) == TWO


def test_a_line_separator_is_part_of_a_prompt(file):
    file.write_text("a cat\u2028sits\na dog\x0bjumps\n", encoding="utf-8")
    assert load_prompts(file) == ["a cat\u2028sits", "a dog\x0bjumps"]


@pytest.mark.parametrize(
    "line",
    ["from the left a cat (white) comes in", "import duties rise, said in words", "class is over: run!", "3 = three"],
)
def test_sentences_are_no_code(file, line):
    file.write_text(f"{line}\n")
    assert load_prompts(file) == [line]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts = __import__('os').listdir('.')", "line 1: this is no list of strings"),
        ("prompts = ['a cat' for _ in range(3)]", "line 1: this is no list"),
        ("prompts = ['a cat']\nopen('written', 'w')", "line 2: this is no list"),
        ("# film\nprompts = ['a cat',\n  'a dog'\n  oh no]", "line 3: this is no list"),
        ("prompts = ['a cat']\nnegative = 'bad'", "line 2: this is no list"),
        ("prompts += ['a cat']", 'line 1 looks like code: "prompts \\+= '),
        ("a cat\nimport os", "line 2 looks like code: 'import os'"),
        ("from os import path", "line 1 looks like code"),
        ("# a\nopen('written', 'w')", "line 2 looks like code"),
        ("x['a'] = 3", "line 1 looks like code"),
        ("def film():\n    pass", "line 1 looks like code"),
        ('"a cat sits",\n"a dog jumps",', "line 1 looks like code"),
        ("a cat\n]", "line 2 looks like code"),
        ("prompts = [1, 2]", r"`prompts\[0\]` must be a string, got int: 1"),
        ("prompts = ['a cat', '']", r"`prompts\[1\]` is empty"),
        ('{"prompt": ["a cat"]}', "holds no prompts"),
        ("prompts = []", "holds no prompts"),
        ("prompts = 'a cat'", "holds no prompts"),
        ("# nothing\n", "holds no prompts"),
        ("", "holds no prompts"),
        ("[" * 100_000, "line 1: this is no list"),
    ],
)
def test_nothing_else_is_read_and_nothing_is_run(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"prompts.txt'.*{message}"):
        load_prompts(file)
    assert [path.name for path in file.parent.iterdir()] == ["prompts.txt"]


def test_a_file_that_cannot_be_read_is_named(file):
    with pytest.raises(ValueError, match="prompts.txt"):
        load_prompts(file)
    for content in (b"\xff\xd8\xff\xe0", "a cat".encode("utf-16-le"), b"\xff\xfea"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"prompts.txt.*text file"):
            load_prompts(file)
