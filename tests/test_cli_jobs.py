"""Many films by one command, dealt out to processes. On the embedded model."""

import json
import sys
from pathlib import Path

import pytest

from diffusers_svi.film import read_clips
from test_cli import generate
from test_cli_typed import Terminal


QUICK = {"num_frames": 9, "num_inference_steps": 1, "prompt": None, "out": None, "num_clips": None}


def write(folder: Path, *jobs: dict) -> None:
    (folder / "films.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))


def prompts(film: Path) -> list[str]:
    return [clip["prompt"] for clip in read_clips(film)]


def test_two_processes_make_two_films_and_a_film_that_fails_does_not_stop_the_others(tmp_path):
    """By gloo, on the CPU; the third is a film that the model cannot make, which is known once that is loaded."""
    write(
        tmp_path,
        {"out": "one.mp4", "prompt": ["a cat wakes", "it jumps"]},
        {"out": "two.mp4", "prompt": "it sleeps", "num_clips": 2, "seed": 5},
        {"out": "three.mp4", "prompt": "it flies", "num_frames": 801},
        {"out": "four.mp4", "prompt": "it lands", "vae_tiling": False},
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    program = [*launch, "diffusers_svi", *map(str, generate(**QUICK, jobs="films.jsonl", device="cpu"))]
    terminal = Terminal(tmp_path, program=program)
    told = terminal.wait_for(r"Root Cause.*={50}")
    assert terminal.close() == 1
    assert "films.jsonl: 3 of 4 films." in told
    assert "films.jsonl, line 3: `num_frames` must be at most" in told.partition("Error: Not made:")[2]
    # Each process has its films, tells which, and only one ends with an error.
    assert told.count("one.mp4, clip 1 of 2: ") == told.count("two.mp4, clip 1 of 2: ") == 1
    assert told.count("\nError: ") == 1
    assert prompts(tmp_path / "one.mp4") == ["a cat wakes", "it jumps"]
    assert prompts(tmp_path / "two.mp4") == ["it sleeps", "it sleeps"]
    assert [clip["made_with"]["seed"] for clip in read_clips(tmp_path / "two.mp4")] == ["5", "47"]
    assert prompts(tmp_path / "four.mp4") == ["it lands"]
    assert not (tmp_path / "three.mp4").exists()

    jobs = (tmp_path / "films.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "films.jsonl").write_text("".join(jobs[:2] + jobs[3:]))
    terminal = Terminal(tmp_path, program=program)
    assert "one.mp4 has 2 clips already" in terminal.wait_for("films.jsonl: 3 of 3 films.")
    assert terminal.close() == 0


def test_a_process_by_itself_loads_a_model_once_and_leaves_out_what_is_done(run_command, tmp_path):
    write(tmp_path, {"out": "one.mp4", "prompt": "a cat wakes"}, {"out": "two.mp4", "prompt": "it jumps"})
    asked = generate(**QUICK, jobs="films.jsonl")
    status, told, errors = run_command(*asked)
    assert status == 0 and "films.jsonl: 2 of 2 films." in told, errors
    assert errors.count("Loading pipeline components...:   0%") == 1
    before = (tmp_path / "one.mp4").read_bytes()
    status, told, errors = run_command(*asked)
    assert status == 0 and "one.mp4 has 1 clips already" in told and "Loading pipeline" not in errors
    assert (tmp_path / "one.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([{"prompt": "a cat"}], "line 1: a line is an object of options, with `out` among them."),
        ([{"out": "one.mp4", "prompt": "a cat", "steps": 3}], "line 1: there is no option 'steps' for a film."),
        ([{"out": "one.mp4", "prompt": "a cat", "height": "tall"}], "'tall' is not a valid integer"),
        ([{"out": "one.mp4", "prompts": "-"}], "line 1: prompts cannot be typed"),
        (
            [{"out": "one.mp4", "prompt": "a cat"}, {"out": "./one.mp4", "prompt": "a dog"}],
            "line 2: another line makes",
        ),
        (
            [{"out": "one.mp4", "prompt": "a cat", "finalize": "two.mp4"}, {"out": "two.mp4", "prompt": "a dog"}],
            "line 2: another line makes 'two.mp4' as well.",
        ),
        ([{"out": "one.mp4", "prompt": "a cat"}, {"out": "two.mp4", "prompt": " "}], "line 2: `prompts[0]` is empty"),
        ([{"out": "one.mp4", "prompt": "a cat"}, {"out": "two.avi", "prompt": "a cat"}], "line 2: `path.suffix`"),
        ([], "holds no films"),
    ],
)
def test_a_line_that_is_not_right_is_told_before_a_model_is_loaded(run_command, tmp_path, jobs, message):
    write(tmp_path, *jobs)
    status, _, errors = run_command(*generate(**QUICK, model="missing", jobs="films.jsonl"))
    assert status == 1 and message in errors, errors
    assert not (tmp_path / "one.mp4").exists()
