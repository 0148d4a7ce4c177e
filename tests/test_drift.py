"""The drift benchmark: what it measures, and that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from conftest import load_script
from diffusers_svi.tiny import world


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "drift.py"


@pytest.fixture(scope="module")
def drift():
    return load_script(SCRIPT)


def states(motion: str = "right") -> list[world.State]:
    start = world.State("green meadow", 5, world.Sprite("circle", "red", "large", 20, 36))
    return world.film(start, [world.Action(motion)])


def test_the_truth_has_full_marks(drift):
    figures = drift.measure(world.render(states()) / 255.0, states())
    assert figures == pytest.approx(dict.fromkeys(drift.FIGURES, 1.0), abs=0.02)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda frames: world.render(states("left")) / 255.0, "direction"),
        (lambda frames: frames[:1].repeat(17, 0), "alive"),
        (lambda frames: np.clip(frames + 0.08, 0, 1), "background"),
        (
            lambda frames: sum(np.roll(frames, shift, axis) for shift in range(-2, 3) for axis in (1, 2)) / 10,
            "sharpness",
        ),
        (lambda frames: frames[..., ::-1], "sprite"),
    ],
)
def test_every_kind_of_damage_shows_in_its_figure(drift, change, part):
    figures = drift.measure(change(world.render(states()) / 255.0), states())
    assert figures[part] < 0.8


def test_intervals_contain_the_value_and_shrink_with_agreement(drift):
    rng = np.random.default_rng(1)
    wide = drift.interval(rng.random((16, 3)), np.mean)
    assert wide["low"] < wide["value"] < wide["high"]
    same = drift.interval(np.full((16, 3), 0.5), np.mean)
    assert same["low"] == same["value"] == same["high"] == 0.5


def test_it_runs(tmp_path):
    arguments = ["--num_chains=1", "--num_clips=2", "--num_inference_steps=2", f"--output_dir={tmp_path}"]
    command = [sys.executable, str(SCRIPT), *arguments, "--contestants", "base", "anchor", "noise"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads((tmp_path / "drift.json").read_text())
    assert set(report["summary"]) == {"consistent", "creative"}
    for measured in report["results"].values():
        assert set(measured) == {"base", "anchor", "noise"}
        assert all(len(result["curves"]["quality"]) == 2 for result in measured.values())
    assert "kept over 10th" in finished.stdout
    assert PIL.Image.open(tmp_path / "drift.png").size[0] > 800
    assert PIL.Image.open(tmp_path / "creative-noise.png").size == (2 * 64, 64)
