"""The drift benchmark: what it measures, and that it runs."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import drift
import numpy as np
import pairs
import PIL.Image
import pytest

from conftest import make_components
from diffusers_svi import PixelMotion, SVIPipeline
from svi_tiny import world


ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, capsys):
    """From a benchmark and its options to what it prints."""

    def main(benchmark, *options) -> str:
        monkeypatch.setattr(sys, "argv", [benchmark.__file__, *map(str, options)])
        benchmark.main()
        return capsys.readouterr().out

    return main


def states(motion: str = "right") -> list[world.State]:
    start = world.State("green meadow", 5, world.Sprite("circle", "red", "large", 20, 36))
    return world.film(start, [world.Action(motion)])


def test_the_truth_has_full_marks():
    figures = drift.measure(world.render(states()) / 255.0, states())
    assert figures == pytest.approx(
        dict.fromkeys(("quality", "sprite", "background", "sharpness", "alive", "direction"), 1.0), abs=0.02
    )


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
def test_every_kind_of_damage_shows_in_its_figure(change, part):
    figures = drift.measure(change(world.render(states()) / 255.0), states())
    assert figures[part] < 0.8


def test_films_may_lie_in_one_of_eight_lights():
    def first(**options) -> np.ndarray:
        args = argparse.Namespace(num_chains=1, num_clips=1, **options)
        (film,) = drift.world_films("consistent", args, PixelMotion(1))
        state, _ = world.sample_story(drift.HELD_OUT_SEED, film.number, 1, "consistent", args.eight_lights)
        assert np.array_equal(np.asarray(film.image), world.render(state))
        return np.asarray(film.image)

    assert not np.array_equal(first(eight_lights=True), first(eight_lights=False))


def test_intervals_contain_the_value_and_shrink_with_agreement():
    rng = np.random.default_rng(1)
    wide = drift.interval(rng.random((16, 3)), np.mean)
    assert wide["low"] < wide["value"] < wide["high"]
    narrow = drift.interval(rng.random((160, 3)), np.mean)
    assert narrow["high"] - narrow["low"] < (wide["high"] - wide["low"]) / 2
    for agreed in (np.full((16, 3), 0.5), np.full((1, 3), 0.5)):
        same = drift.interval(agreed, np.mean)
        assert same["low"] == same["value"] == same["high"] == 0.5


def test_an_interval_leaves_out_draws_without_a_figure():
    """Of two chains, one without motion: a quarter of the draws has no figure."""
    assert drift.interval(np.array([0.5, np.nan]), np.nanmean) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_an_error_of_the_light_lowers_quality_but_hides_no_sprite():
    lit = [replace(state, light=(0.8, 0.9, 0.7)) for state in states()]
    right = drift.measure(world.render(lit) / 255.0, lit)
    assert right["quality"] > 0.98
    wrong = drift.measure(world.render(lit) / 255.0 * [1.1, 1.0, 1.0], lit)
    assert wrong["background"] < 0.85 and 0.9 < wrong["sprite"] < right["sprite"]


def test_without_a_truth_clips_are_measured_against_the_first():
    clip = world.render(states()) / 255.0
    measure = drift.FromFirst()
    assert measure(clip, 0) == pytest.approx(dict.fromkeys(measure(clip, 0), 1.0))
    assert measure(clip * 0.9, 17)["colour"] < 0.8 and measure(clip * 0.9, 17)["contrast"] == pytest.approx(0.9)
    blurred = (clip + np.roll(clip, 1, axis=1) + np.roll(clip, 1, axis=2)) / 3
    assert measure(blurred, 17)["sharpness"] < 0.9
    assert measure(clip[:1].repeat(17, 0), 17)["alive"] == 0


def test_any_model_on_images_and_prompts_of_ones_own(run, tmp_path):
    SVIPipeline(**make_components("i2v")).save_pretrained(tmp_path / "model")
    images = [ROOT / "docs" / "images" / "start.png"] * 2
    (tmp_path / "prompts.txt").write_text("a cat sits\na dog jumps\n")
    options = ["--num_clips=2", "--num_inference_steps=2", "--height=32", "--width=32", "--num_frames=9"]
    files = ["--images", *images, f"--prompts={tmp_path / 'prompts.txt'}", f"--output_dir={tmp_path}"]
    run(drift, f"--model_dir={tmp_path / 'model'}", *options, *files, "--contestants", "base")
    results = json.loads((tmp_path / "drift.json").read_text())["results"]
    for setting in ("consistent", "creative"):
        curves = results[setting]["base"]["curves"]
        assert set(curves) == {"quality", "colour", "contrast", "sharpness", "alive"}
        assert curves["quality"][0] == pytest.approx(1) and 0 < curves["quality"][1] < 1
    assert PIL.Image.open(tmp_path / "creative-base.png").size == (2 * 32, 2 * 32)


def test_it_runs(run, tmp_path):
    """As a program of a plain checkout, and once more from here."""
    options = ["--num_chains=1", "--num_clips=2", "--num_inference_steps=2", "--save_clips"]
    options += [f"--output_dir={tmp_path}", "--contestants", "base", "noise"]
    command = [sys.executable, "benchmarks/drift.py", *options]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    report = json.loads((tmp_path / "drift.json").read_text())
    assert set(report["summary"]) == {"consistent", "creative"}
    for measured in report["results"].values():
        assert set(measured) == {"base", "noise"}
        assert all(len(result["curves"]["quality"]) == 2 for result in measured.values())
    assert "kept over 10th" in finished.stdout
    assert PIL.Image.open(tmp_path / "drift.png").size[0] > 800
    assert PIL.Image.open(tmp_path / "creative-noise.png").size == (2 * 64, 64)
    assert PIL.Image.open(tmp_path / "creative.png").size[0] > 300
    clips = sorted(path.name.split("-")[1] for path in (tmp_path / "clips" / "creative-noise").iterdir())
    assert clips == ["001.mp4", "002.mp4"]
    with av.open(next((tmp_path / "clips" / "creative-noise").iterdir())) as container:
        # The last frame of a clip that is gone on from is the first of the next.
        assert sum(1 for _ in container.decode(video=0)) in (16, 17)

    # Again, with two chains lost: they are made again, the others are not, and the figures are the same.
    chains = {path: path.stat().st_mtime_ns for path in (tmp_path / "chains").glob("*.json")}
    assert len(chains) == 4
    lost = [path for path in chains if "base" in path.name]
    for path in lost:
        path.unlink()
    run(drift, *options)
    again = json.loads((tmp_path / "drift.json").read_text())
    assert again["results"] == report["results"]
    assert {path for path, changed in chains.items() if path.stat().st_mtime_ns != changed} == set(lost)


def test_error_recycling_is_compared_with_the_control_of_its_own_scheme():
    def contestant(kept: float, last: float) -> dict:
        quality = [[0.9, last], [0.9, last]]
        return {"kept_over_tenth": {"value": kept}, "quality_last": {"value": last}, "chains": {"quality": quality}}

    measured = {
        "base": contestant(0.8, 0.5),
        "control-shot": contestant(0.7, 0.2),
        "control-pro": contestant(0.6, 0.4),
        "erft-shot": contestant(0.9, 0.6),
        "erft-pro": contestant(0.95, 0.7),
    }
    expected = {"base_kept": 0.8, "control_kept": 0.6, "erft_kept": 0.95, "error_vs_control": 0.5}
    summary = drift.summarize_setting(measured)
    assert summary.pop("lost_less_than_control") == pytest.approx({"value": 0.3, "low": 0.3, "high": 0.3})
    assert summary == pytest.approx(expected)
    measured["control"] = measured.pop("control-pro")
    summary = drift.summarize_setting(measured)
    assert {name: summary[name] for name in expected} == pytest.approx(expected)
    assert drift.summarize_setting({"base": measured["base"]}) == {"base_kept": 0.8}


def test_pairs_are_compared_chain_by_chain(run, tmp_path):
    """The control is 0.1 worse throughout in one chain, and 0.3 worse at the end of the other."""
    control = [[0.4] * 4, [0.5, 0.5, 0.2, 0.2]]
    figures = {"control-a": control, "erft-a": [[0.5] * 4] * 2, "base": control, "erft-alone": control}
    measured = {name: {"chains": {"quality": quality}} for name, quality in figures.items()}
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "drift.json"
    file.write_text(json.dumps({"results": {"consistent": measured}}))
    printed = run(pairs, file, f"--output_dir={tmp_path}")
    found = json.loads((tmp_path / "pairs.json").read_text())["pairs"]
    assert set(found) == {"run, consistent, erft-a"} and "run, consistent, erft-a" in printed
    end, change = (found["run, consistent, erft-a"]["quality"][name] for name in ("end", "change"))
    assert end == pytest.approx({"value": 0.2, "low": 0.1, "high": 0.3})
    assert change == pytest.approx({"value": 0.15, "low": 0.0, "high": 0.3})
    assert PIL.Image.open(tmp_path / "pairs.png").size[0] > 800

    del measured["control-a"]
    file.write_text(json.dumps({"results": {"consistent": measured}}))
    with pytest.raises(ValueError, match="`files` hold no pair"):
        run(pairs, file, f"--output_dir={tmp_path}")


def test_prompts_that_say_more_of_a_clip_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n[/duration=10s] a dog")
    args = argparse.Namespace(prompts=tmp_path / "prompts.txt", num_clips=2, images=[])
    with pytest.raises(ValueError, match="`--prompts`: .*prompts.txt says more of a clip than its prompt"):
        list(drift.own_films("creative", args))


def test_matched_colours_are_one_more_contestant(run, tmp_path):
    options = ["--num_chains=1", "--num_clips=2", "--num_inference_steps=1", "--settings=consistent"]
    run(drift, *options, f"--output_dir={tmp_path}", "--contestants", "base", "anchor", "--color_match", "mkl")
    measured = json.loads((tmp_path / "drift.json").read_text())["results"]["consistent"]
    assert list(measured) == ["base", "base-mkl", "anchor"]
    assert measured["base"]["scheme"] == measured["base-mkl"]["scheme"]
    assert measured["base"]["chains"] != measured["base-mkl"]["chains"]
