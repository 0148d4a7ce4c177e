import pytest

from diffusers_svi import load_prompts


def test_one_prompt_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat sits\n\n  the dog jumps \n", encoding="utf-8")
    assert load_prompts(file) == ["a cat sits", "the dog jumps"]


@pytest.mark.parametrize("text", ['prompts = ["a cat", "a dog"]', "prompts=[\n 'a cat',\n 'a dog',\n]\n"])
def test_the_form_of_the_authors(tmp_path, text):
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    assert load_prompts(file) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "text",
    [
        "prompts = __import__('os').listdir('.')",
        "prompts = ['a cat' for _ in range(3)]",
        "prompts = ['a cat']\nopen('written', 'w')",
        "prompts = [1, 2]",
        "prompts = []",
        "prompts = ['a cat', '']",
        "",
    ],
)
def test_nothing_else_is_read_and_nothing_is_run(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match="prompts"):
        load_prompts(file)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing.txt"):
        load_prompts(tmp_path / "missing.txt")
    (tmp_path / "image.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"image.txt.*text file"):
        load_prompts(tmp_path / "image.txt")
