import json

import PIL.Image
import pytest
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import parse_prompt_segments

from diffusers_svi import ClipSpec, load_prompts, parse_prompts


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
        ("prompts = __import__('os').listdir('.')", "line 1: this is no list of prompts"),
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
        ('{"prompt": ["a cat"]}', r"`prompts\[0\]` must be a string, got list"),
        ('{"prompts": "a cat"}', "holds no prompts"),
        ('{"prompts": ["a cat"], "seed": 3}', r"`prompts\[0\]`: .*prompts"),
        ("{'prompt': 'a cat'}", "line 1: this is no JSON"),
        ('# film\n{"prompt": "a cat"}\n{"prompt": "a dog"', "line 3: this is no JSON"),
        ("{" * 100_000, "line 1: this is no JSON"),
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


def test_a_text_is_read_as_a_file_is(file):
    assert parse_prompts(LIST) == TWO
    with pytest.raises(ValueError, match="^`text`: line 2 looks like code"):
        parse_prompts("a cat\nimport os")
    with pytest.raises(ValueError, match="^the box: it holds no prompts"):
        parse_prompts("", source="the box")


# JSON and JSONL of clips


FIELDS = {"negative_prompt": "rain", "seed": 7, "guidance_scale": 4.0, "num_clips": 2, "lora_weights": {"a": 0.5}}
SPECS = [ClipSpec("a cat sits", **FIELDS), "a dog jumps"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"prompt": "a cat sits", **FIELDS}, "a dog jumps"]),
        json.dumps({"prompts": [{"prompt": "a cat sits", **FIELDS}, {"prompt": "a dog jumps"}]}, indent=1),
        "# two\n" + json.dumps({"prompt": "a cat sits", **FIELDS}) + '\n\n{"prompt": "a dog jumps"}\n',
        f"prompts = [{ {'prompt': 'a cat sits', **FIELDS} }, 'a dog jumps']",
    ],
)
def test_clips_have_their_fields(file, text):
    file.write_text(text)
    assert load_prompts(file) == SPECS


def test_images_of_clips_are_found_beside_the_file(file):
    names = ("cut", "anchor", "last_image")
    (file.parent / "stills").mkdir()
    for shade, name in enumerate(names, 1):
        PIL.Image.new("RGB", (16, 16), (shade, 0, 0)).save(file.parent / "stills" / f"{name}.png")
    text = "\n".join(json.dumps({"prompt": "a", name: f"stills/{name}.png"}) for name in names)
    file.write_text(text)
    for clips in (load_prompts(file), parse_prompts(text, file.parent)):
        images = [getattr(clip, name) for clip, name in zip(clips, names, strict=True)]
        assert [image.getpixel((0, 0)) for image in images] == [(1, 0, 0), (2, 0, 0), (3, 0, 0)]
    with pytest.raises(ValueError, match=r"^`text`: `prompts\[0\]`: .*`cut`.*stills/cut.png"):
        parse_prompts(text)
    (file.parent / "stills" / "anchor.png").unlink()
    with pytest.raises(ValueError, match=r"prompts.txt': `prompts\[1\]`: `anchor`.*anchor.png"):
        load_prompts(file)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"prompt": "a", "speed": 2}, r"`prompts\[1\]`: .*speed"),
        ({"prompt": None}, r"`prompts\[1\]`.*"),
        ({"seed": 2}, r"`prompts\[1\]`: .*prompt"),
        ({"prompt": "a", "seed": -2}, r"`prompts\[1\].*seed` must be a whole number .* got -2"),
        ({"prompt": " "}, r"`prompts\[1\]` is empty"),
    ],
)
def test_a_field_that_is_not_right_is_named(clip, message):
    for text in (json.dumps(["a", clip]), '{"prompt": "a"}\n' + json.dumps(clip)):
        with pytest.raises(ValueError, match=message):
            parse_prompts(text)


# Directions of Wan2GP


def test_directions_say_how_long_a_prompt_holds():
    text = """# a film
[/duration=5s] a cat sits
[/duration=162, /overlap] a dog jumps [slowly]
[ /Duration = 20.25 S ][/overlap]a bird sings
a fish swims"""
    three = [ClipSpec("a dog jumps [slowly]", num_clips=2), ClipSpec("a bird sings", num_clips=4), "a fish swims"]
    assert parse_prompts(text) == ["a cat sits", *three]
    assert parse_prompts("[/duration=5s] a", num_frames=17, fps=24) == [ClipSpec("a", num_clips=7)]


@pytest.mark.parametrize(("frames", "num_clips"), [(1, 1), (121, 1), (122, 2), (202, 2), (203, 3)])
def test_a_duration_is_rounded_to_clips_and_never_to_none(frames, num_clips):
    (clip,) = parse_prompts(f"[/duration={frames}] a")
    assert clip == (ClipSpec("a", num_clips=num_clips) if num_clips > 1 else "a")


def test_a_duration_that_is_far_from_whole_clips_warns(caplog):
    parse_prompts("[/duration=5s] a\n[/duration=89] b")
    assert not caplog.text
    parse_prompts("a\n[/duration=121] b")
    assert "line 2: `/duration=121` is 121 frames. A clip has 81: it becomes 1, 81 frames." in caplog.text


def test_lora_weights_hold_for_their_line():
    text = "a\n[/loras_mult=1;3 0.5] b\nc\n[/loras_mult=0 .25] d"
    weights = {"svi": {"transformer": 1.0, "transformer_2": 3.0}, "fast": 0.5}
    expected = ["a", ClipSpec("b", lora_weights=weights)]
    again = {"svi": 1.0, "fast": 1.0}
    last = ClipSpec("d", lora_weights={"svi": 0.0, "fast": 0.25})
    assert parse_prompts(text, adapters=["svi", "fast"]) == [*expected, ClipSpec("c", lora_weights=again), last]
    again = {"svi": 0.9, "fast": {"transformer": 0.5, "transformer_2": 1.0}}
    assert parse_prompts(text, adapters=again) == [*expected, ClipSpec("c", lora_weights=again), last]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[/duration=20%] a", "line 2: `/duration=20%`: nobody knows how long the whole film will be"),
        ("[/duration] a", "line 2: `/duration` is no duration. Write frames"),
        ("[/duration=0s] a", "line 2: `/duration=0s` is no duration"),
        ("[/duration=5min] a", "line 2: `/duration=5min` is no duration"),
        ("[/duration=-3] a", "line 2: `/duration=-3` is no duration"),
        ("[/duration=99999999] a", "line 2: `/duration=99999999` is 1234568 clips, of which there may be 100000"),
        ("[/duration=5s,/duration=6s] a", "line 2 has `/duration` twice"),
        ("[/overlap=9] a", "line 2: `/overlap=9`: the scheme says how many frames clips overlap.*`condition_frames`"),
        ("[/overlap=0] a", 'line 2: `/overlap=0`: a new shot begins with an image.*"cut": "image.png"'),
        ("[/new_shot] a", 'line 2: `/new_shot`: a new shot begins with an image.*"cut": "image.png"'),
        ("[/no_end_image] a", "line 2: `/no_end_image`: .*`last_image`"),
        ("[/store_mem=man1] a", "line 2: `/store_mem=man1`: this is not known. Directions are `/duration`"),
        ("[/loras_mult=1;3;1 1] a", "line 2: .* '1;3;1' is no weight"),
        ("[/loras_mult=1,0.5 1] a", "line 2: .* weights that change from step to step, '1,0.5', are not known"),
        ("[/loras_mult=nan 1] a", "line 2: .* 'nan' is no weight"),
        (
            "[/loras_mult=1 0.5 2] a",
            r"line 2: `/loras_mult=1 0.5 2` has 3 weights, and `adapters` 2 names: \['x', 'y'",
        ),
        ("[/loras_mult] a", "line 2: `/loras_mult` has 0 weights"),
        ("[/duration=5s]", "line 2 has directions but no prompt"),
        ("[/duration=5s a", "line 2 has a bracket that is not closed"),
        ("a [/new_shot] b", "line 2 has `\\[/new_shot` after its beginning. Put it first"),
        ('! {Who}="cat","dog"', "line 2 is a macro of Wan2GP"),
    ],
)
def test_directions_that_mean_nothing_here_are_refused(file, line, message):
    file.write_text(f"[/duration=5s] a\n{line}\n")
    with pytest.raises(ValueError, match=f"prompts.txt': {message}"):
        load_prompts(file, adapters=["x", "y"])


def test_lora_weights_need_names():
    with pytest.raises(ValueError, match='line 1: `/loras_mult=1` has weights by place.*`adapters=\\["default_0"\\]`'):
        parse_prompts("[/loras_mult=1] a")


@pytest.mark.parametrize("line", ["! what a cat", "a [/b] cat", "[Verse] | a", "0:a cat"])
def test_what_only_looks_like_a_direction_is_a_prompt(line):
    assert parse_prompts(f"a dog\n{line}") == ["a dog", line]


# Bars


def test_bars_part_the_clips_of_a_single_line():
    assert parse_prompts("# film\n a cat sits |a dog jumps\n") == TWO
    assert parse_prompts("a | b\nc | d") == ["a | b", "c | d"]
    for text in ("a cat |", "| a cat", "a || b"):
        with pytest.raises(ValueError, match="line 1 has nothing on one side of a `|`"):
            parse_prompts(text)


# Sections of musubi's FramePack


@pytest.mark.parametrize(
    ("text", "num_clips", "expected"),
    [
        ("0:a;;;1-2:b;;;-1:c", 5, "abbac"),
        ("0:a;;;1-2:b;;;-1:c", 3, "abc"),
        ("0:a;;;2:b", None, "aab"),
        ("0:a;;;2:b", 5, "aabaa"),
        ("a;;; 2 : b", None, "aab"),
        ("3:b;;;1:a", None, "aaab"),
        ("-1:b;;;-2:a", 4, "aaab"),
        ("-1:c;;;0-3:a", 4, "aaac"),
        ("0-3:a;;;1:b;;;1:c", None, "acaa"),
        ("# film\n0:a;;;\n\n1:b\n;;;2:c", None, "abc"),
    ],
)
def test_sections_are_clips(text, num_clips, expected):
    assert parse_prompts(text, num_clips=num_clips) == list(expected)


def test_a_section_may_have_lines_and_colons():
    assert parse_prompts("0:a cat: sits\n  and waits;;;1:b") == ["a cat: sits and waits", "b"]


@pytest.mark.parametrize(
    ("text", "num_clips", "message"),
    [
        ("0:a;;;\n-1:b", None, "line 2: section `-1` counts from the end.*Say `num_clips`"),
        ("0:a;;;\n\n4:b", 4, "line 3: there is no section `4` in 4 clips"),
        ("0:a;;;-5:b", 4, "line 1: there is no section `-5` in 4 clips"),
        ("0:a;;;1-100000:b", None, "line 1: there is no section `1-100000` in 100000 clips"),
        ("0:a;;;2-1:b", None, "line 1: `2-1` is no range of sections"),
        ("0:a;;;-3-1:b", 4, "line 1: `-3-1` is no range of sections. Name them one by one"),
        ("0:a;;;first:b", None, "line 1: 'first:b' is no section. Write `0:prompt`"),
        ("0:a;;;1:", None, "line 1: '1:' is no section"),
        ("0:a;;;", None, "line 1: '' is no section"),
        ("0:a", 0, "`num_clips` must be a whole number of at least 1, got 0"),
    ],
)
def test_sections_that_are_not_there_are_refused(file, text, num_clips, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=f"prompts.txt': {message}"):
        load_prompts(file, num_clips=num_clips)


# `prompt_segments` of diffusers


@pytest.mark.parametrize(
    "segments",
    [
        [{"start_window": 0, "end_window": 2, "text": "a"}, {"start_window": 3, "end_window": 3, "text": "b"}],
        [{"end_window": 1, "text": "a"}, {"start_window": 3, "text": "b"}],
        [{"end_window": 3, "text": "b"}, {"end_window": 2, "text": "a"}],
        [{"text": "a"}, {"start_window": 3, "end_window": 3, "text": "b"}],
        [{"text": "a"}, {"start_window": 1, "end_window": 2, "text": ""}, {"start_window": 3, "text": "b"}],
    ],
)
def test_segments_are_clips_as_in_diffusers(segments):
    """Gaps have the text before, and what is said last holds; diffusers wants an `end_window` with a start."""
    told = [{"end_window": segment.get("start_window", 0), **segment} for segment in segments]
    assert parse_prompt_segments("", told) == list("aaab")
    for value in (segments, {"prompt_segments": segments}):
        assert parse_prompts(json.dumps(value)) == list("aaab")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([{"start_window": 1, "text": "a"}], "`prompt_segments` must begin with window 0, and with a text"),
        ([{"text": " "}], "`prompt_segments` must begin with window 0, and with a text"),
        ([{"text": "a"}, {"start_window": 1}], r"`prompt_segments\[1\].text` must be a string, got None"),
        (
            [{"text": "a", "seed": 3}],
            r"`prompt_segments\[0\]` must have start_window, end_window, text and nothing else",
        ),
        ([{"text": "a"}, "b"], r"`prompt_segments\[1\]` must have start_window"),
        ([{"text": "a", "start_window": -1}], r"`prompt_segments\[0\].start_window` must be a whole number of 0 to"),
        (
            [{"text": "a", "start_window": 2, "end_window": 1}],
            r"`prompt_segments\[0\].end_window` must be a whole number of 2 to 99999, got 1",
        ),
        (
            [{"text": "a", "end_window": 10**9}],
            r"`prompt_segments\[0\].end_window` must be a whole number of 0 to 99999",
        ),
    ],
)
def test_segments_that_are_not_right_are_refused(segments, message):
    for value in (segments, {"prompt_segments": segments}):
        with pytest.raises(ValueError, match=message):
            parse_prompts(json.dumps(value))


@pytest.mark.parametrize(("name", "value"), [("num_frames", 0), ("fps", 0), ("fps", float("nan")), ("num_clips", 1.5)])
def test_what_a_schedule_is_read_with_is_checked(name, value):
    with pytest.raises(ValueError, match=f"`text`: `{name}` must be"):
        parse_prompts("a", **{name: value})
