"""The journal of a film's prompts: none is swallowed and none used twice, whatever happens to the run."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_svi import ClipSpec
from diffusers_svi.journal import Journal


# Takes prompts from its input; of each it makes a clip, a line of the film, which is done when it is told so.
FILM = """
import sys
from pathlib import Path
from diffusers_svi.journal import Journal

journal, film = sys.argv[1:]
done = Path(film).read_text().splitlines()
typed = map(str.strip, iter(sys.stdin.readline, ""))
for index, spec in enumerate(Journal(journal).prompts(typed)):
    if index >= len(done):
        print("begun", spec.prompt, flush=True)
        assert sys.stdin.readline() == "done\\n"
        with open(film, "a") as file:
            file.write(spec.prompt + "\\n")
"""


def prompts(specs: Iterator[ClipSpec]) -> list[str]:
    return [spec.prompt for spec in specs]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_prompt_is_on_disk_when_its_clip_begins_and_none_is_asked_for_before(tmp_path):
    asked = []

    def typed() -> Iterator[str]:
        for prompt in ("a cat wakes", "it jumps", "it sleeps"):
            asked.append(prompt)
            yield prompt

    path = tmp_path / "film.mp4.journal"
    clips = Journal(path).prompts(typed())
    for index in range(3):
        prompt = next(clips).prompt
        assert asked[-1] == prompt and len(asked) == index + 1
        assert lines(path)[-1] == {"prompt": prompt} and len(lines(path)) == index + 1
    assert next(clips, None) is None


def test_prompts_that_were_used_come_again_before_new_ones(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path).prompts(["a cat wakes", "it jumps", "it is never seen"])
    assert [next(first).prompt, next(first).prompt] == ["a cat wakes", "it jumps"]
    again = Journal(path)
    assert prompts(again.entries) == ["a cat wakes", "it jumps"]
    assert prompts(again.prompts(["it sleeps"])) == ["a cat wakes", "it jumps", "it sleeps"]
    assert prompts(Journal(path).entries) == ["a cat wakes", "it jumps", "it sleeps"]


def test_a_killed_run_loses_no_prompt_and_uses_none_twice(tmp_path):
    """By SIGKILL while a clip is made, and again while the next is waited for."""
    journal, film = tmp_path / "journal", tmp_path / "film"
    film.touch()

    def run(typed: str, *begun: str) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", FILM, str(journal), str(film)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        process.stdin.write(typed)
        process.stdin.flush()
        assert [process.stdout.readline() for _ in begun] == [f"begun {prompt}\n" for prompt in begun]
        process.send_signal(signal.SIGKILL)
        process.communicate()

    run("one\ndone\ntwo\n", "one", "two")
    run("", "two")  # which is made anew, with its own prompt
    run("done\nthree\n", "two", "three")
    run("done\n\ndone\nfour\n", "three", "three", "four")
    assert film.read_text().split() == ["one", "two", "three", "three"]
    assert prompts(Journal(journal).entries) == ["one", "two", "three", "three", "four"]


def test_an_empty_line_repeats_the_last_prompt_but_not_its_seed(tmp_path):
    path = tmp_path / "journal"
    clips = Journal(path).prompts([ClipSpec("a cat wakes", seed=7, guidance_scale=3.0), "", " \n", "it jumps"])
    held = {"prompt": "a cat wakes", "guidance_scale": 3.0}
    assert [spec.to_dict() for spec in clips] == [{**held, "seed": 7}, held, held, {"prompt": "it jumps"}]


def test_an_empty_line_repeats_what_was_used_before_the_kill(tmp_path):
    next(Journal(tmp_path / "journal").prompts(["a cat wakes"]))
    assert prompts(Journal(tmp_path / "journal").prompts([""])) == ["a cat wakes"] * 2


def test_nothing_can_be_repeated_at_the_beginning(tmp_path):
    with pytest.raises(ValueError, match=re.escape("`prompts[0]` is empty")):
        next(Journal(tmp_path / "journal").prompts([""]))
    assert not (tmp_path / "journal").exists()


def test_a_prompt_of_several_clips_is_written_clip_by_clip(tmp_path):
    """So that a restart in the middle goes on in the middle."""
    path = tmp_path / "journal"
    clips = Journal(path).prompts([{"prompt": "a cat wakes", "seed": 5, "num_clips": 3}, "it jumps"])
    next(clips), next(clips)
    assert lines(path) == [{"prompt": "a cat wakes", "seed": 5}, {"prompt": "a cat wakes", "seed": 6}]


def test_the_last_prompt_holds_and_is_written_for_every_clip(tmp_path):
    """Else a prompt typed after a restart would count for a clip that is long done."""
    path = tmp_path / "journal"
    assert prompts(Journal(path).prompts(["a cat wakes"], num_clips=3)) == ["a cat wakes"] * 3
    assert prompts(Journal(path).prompts(["it jumps"], num_clips=5)) == ["a cat wakes"] * 3 + ["it jumps"] * 2


@pytest.mark.parametrize("cut", [1, 10, 22])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    """Its clip was not begun."""
    path = tmp_path / "journal"
    assert prompts(Journal(path).prompts(["a cat wakes", "it jumps"])) == ["a cat wakes", "it jumps"]
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path)
    assert prompts(journal.entries) == ["a cat wakes"]
    assert prompts(journal.prompts(["it sleeps"])) == ["a cat wakes", "it sleeps"]
    assert lines(path) == [{"prompt": "a cat wakes"}, {"prompt": "it sleeps"}]


def test_what_a_film_has_is_taken_from_it_where_the_journal_lacks_it(tmp_path):
    path = tmp_path / "journal"
    made = [ClipSpec("a cat wakes", seed=0), ClipSpec("it jumps", seed=42)]
    assert prompts(Journal(path, made).entries) == ["a cat wakes", "it jumps"] and not path.exists()
    assert prompts(Journal(path, made).prompts(["it sleeps"])) == ["a cat wakes", "it jumps", "it sleeps"]
    assert lines(path)[1] == {"prompt": "it jumps", "seed": 42}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (["a cat wakes", "it sleeps"], "clip 1 of it is 'it jumps', but that of the film was made with 'it sleeps'"),
        ([], "clip 1 of it is 'it jumps', but that of the film is not there"),
    ],
)
def test_the_journal_of_another_film_is_refused(tmp_path, made, message):
    list(Journal(tmp_path / "journal").prompts(["a cat wakes", "it jumps"]))
    with pytest.raises(ValueError, match=re.escape(message)):
        Journal(tmp_path / "journal", [ClipSpec(prompt) for prompt in made])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat wakes", "line 2 is not what a journal has there (Expecting value"),
        ('{"prompt": ""}', "line 2 is not what a journal has there (`prompts[1]` is empty"),
        ('{"prompt": "it", "steps": 3}', "field 'steps'"),
        ("[" * 100_000, "line 2 is not what a journal has there"),
    ],
)
def test_a_damaged_journal_is_refused(tmp_path, line, message):
    path = tmp_path / "journal"
    path.write_text('{"prompt": "a cat wakes"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        Journal(path)


def test_a_prompt_that_cannot_be_written_down_is_not_used(tmp_path):
    """The disk is full, say: the run ends, and once there is room goes on."""
    path = tmp_path / "journal"
    clips = Journal(path).prompts(["a cat wakes", "it jumps"])
    next(clips)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        next(clips)
