"""Folders of start images and prompts, as the authors of SVI keep them."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from diffusers_svi import ClipSpec, load_stories


def picture(path: Path, colour: int, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((side, side, 3), colour, np.uint8)).save(path)


def story(folder: Path, prompts: str = "a cat sits\na dog jumps\n", **images: int) -> None:
    """With images by name without suffix; `frame` and others are PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt.txt").write_text(prompts)
    for name, colour in images.items():
        picture(folder / f"{name}.png", colour)


def colour(image: PIL.Image.Image) -> int:
    return np.asarray(image)[0, 0, 0]


def test_stories_are_read_in_the_order_of_their_names(tmp_path):
    story(tmp_path / "second", 'prompts = ["it wakes", "it runs"]', frame=20)
    story(tmp_path / "first", frame=10)
    (tmp_path / "README.md").write_text("what these are")
    (tmp_path / ".git").mkdir()
    first, second = load_stories(tmp_path)
    assert (first.name, first.prompts, colour(first.image)) == ("first", ["a cat sits", "a dog jumps"], 10)
    assert (second.name, second.prompts, colour(second.image)) == ("second", ["it wakes", "it runs"], 20)


def test_a_folder_may_be_a_story_itself(tmp_path, monkeypatch):
    story(tmp_path / "film", "[/duration=10s] a cat sits", start=10)
    monkeypatch.chdir(tmp_path / "film")
    (only,) = load_stories(".")
    assert only.name == "film" and only.prompts == [ClipSpec("a cat sits", num_clips=2)]


def test_the_start_image_is_the_frame_or_the_only_image(tmp_path):
    story(tmp_path / "a", frame=10, other=20)
    picture(tmp_path / "a" / "frame.jpg", 30)
    story(tmp_path / "b", frame=40, other=50)
    story(tmp_path / "c", other=60)
    assert [colour(told.image) for told in load_stories(tmp_path)] == [30, 40, 60]


def test_a_film_is_made_of_a_story(i2v, tmp_path):
    story(tmp_path / "cat", frame=90)
    (told,) = load_stories(tmp_path)
    options = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert len(i2v(image=told.image, prompts=told.prompts, seeds=[1, 2], **options).frames[0]) == 2 * 9 - 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no stories"),
        ({"a/frame.png": 10}, "a has no prompt.txt"),
        ({"a/prompt.txt": "a cat"}, "must have one start image, got none. Call it frame.jpg"),
        ({"a/prompt.txt": "a cat", "a/x.png": 10, "a/y.jpg": 20}, "must have one start image, got x.png, y.jpg"),
        ({"a/prompt.txt": "", "a/frame.png": 10}, "prompt.txt.*it holds no prompts"),
        ({"a/prompt.txt": "import os", "a/frame.png": 10}, "looks like code"),
        ({"a/prompt.txt": "a cat", "a/frame.png": "no picture"}, "no film can begin with .*frame.png"),
    ],
)
def test_what_is_no_story_is_refused(tmp_path, files, message):
    for name, content in files.items():
        if isinstance(content, int):
            picture(tmp_path / name, content)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_stories(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`folder`=.*gone\' is no folder"):
        load_stories(tmp_path / "gone")
