"""The drift benchmark: what it measures, and that it runs."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import drift
import ends
import numpy as np
import pairs
import PIL.Image
import pytest
import vbench

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
    images = [ROOT / "docs" / "images" / "start.png"]
    args = argparse.Namespace(prompts=tmp_path / "prompts.txt", images=list(map(str, images)), stories=None)
    with pytest.raises(ValueError, match="`--prompts`: .*prompts.txt says more of a clip than its prompt"):
        drift.own_stories(args)


def test_ends_are_the_change_from_the_first_to_the_last_15_percent_of_a_film():
    """Of twenty clips three at either end; a film that gets better counts as one that gets worse."""
    worse = np.linspace(1, 0, 20)
    assert drift.start_end(np.stack([worse, worse[::-1]])) == pytest.approx([17 / 19] * 2)
    assert drift.start_end(np.array([[0.5, 9, 9, 0.25]])) == pytest.approx([0.25])
    # Clips without a figure are left out, and so are films without any at one end.
    nan = np.nan
    ends = drift.start_end(np.array([[nan, 0.5, *[9] * 6, 0.1, nan], [nan, nan, *[9] * 6, 0.1, 0.2]]))
    assert ends == pytest.approx([0.4, nan], nan_ok=True)


def test_ends_are_found_in_files_of_before(run, tmp_path):
    chains = {"quality": [[0.9, 0.5, 0.4], [0.8, 0.5, 0.7]]}
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "drift.json"
    file.write_text(json.dumps({"results": {"consistent": {"base": {"chains": chains}}}}))
    printed = run(ends, file, f"--output_dir={tmp_path}")
    found = json.loads((tmp_path / "ends.json").read_text())["ends"]["run, consistent, base"]
    assert found["chains"] == 2 and found["quality"] == pytest.approx({"value": 0.3, "low": 0.1, "high": 0.5})
    assert "quality    0.300 (0.100 to 0.500)" in printed


def test_the_committed_ends_are_those_of_the_committed_chains():
    folder = ROOT / "docs" / "results" / "drift"
    assert json.loads((folder / "ends.json").read_text())["ends"] == ends.find_ends(folder / "drift.json")


def test_films_are_written_as_vbench_long_reads_them(run, tmp_path):
    """Two stories with the same first prompt are films 0 and 1 of it, whole, and nothing lies beside them."""
    SVIPipeline(**make_components("i2v")).save_pretrained(tmp_path / "model")
    for name in ("b", "a"):
        (tmp_path / "stories" / name).mkdir(parents=True)
        (tmp_path / "stories" / name / "prompt.txt").write_text('prompts = ["a cat sits", "a dog jumps"]')
        start = PIL.Image.open(ROOT / "docs" / "images" / "start.png")
        start.transpose(PIL.Image.Transpose.ROTATE_90 if name == "b" else PIL.Image.Transpose.ROTATE_180).save(
            tmp_path / "stories" / name / "frame.png"
        )
    options = ["--num_clips=2", "--num_inference_steps=1", "--height=32", "--width=32", "--num_frames=9"]
    options += [f"--model_dir={tmp_path / 'model'}", "--contestants", "base", "--settings", "creative"]
    run(drift, *options, f"--stories={tmp_path / 'stories'}", "--save_films", f"--output_dir={tmp_path / 'out'}")
    films = sorted((tmp_path / "out" / "vbench" / "creative-base").iterdir())
    assert [film.name for film in films] == ["a cat sits-0.mp4", "a cat sits-1.mp4"]
    for film in films:
        with av.open(film) as container:
            assert sum(1 for _ in container.decode(video=0)) == 2 * 9 - 1
            assert container.streams.video[0].average_rate == 16
    assert films[0].read_bytes() != films[1].read_bytes()
    results = json.loads((tmp_path / "out" / "drift.json").read_text())["results"]["creative"]["base"]
    first, last = np.array(results["chains"]["quality"]).T
    assert results["ends"]["quality"]["value"] == pytest.approx(np.abs(first - last).mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a cat / a dog", "holds '/'"), ("a_cat", "holds '_'"), ("a" * 246, "252 bytes, of at most 251")],
)
def test_prompts_that_vbench_long_could_not_read_are_refused(prompt, message):
    assert vbench.film_name("a" * 245, 3) == "a" * 245 + "-3.mp4"
    with pytest.raises(ValueError, match=message):
        vbench.film_name(prompt, 0)


def test_matched_colours_are_one_more_contestant(run, tmp_path):
    options = ["--num_chains=1", "--num_clips=2", "--num_inference_steps=1", "--settings=consistent"]
    run(drift, *options, f"--output_dir={tmp_path}", "--contestants", "base", "anchor", "--color_match", "mkl")
    measured = json.loads((tmp_path / "drift.json").read_text())["results"]["consistent"]
    assert list(measured) == ["base", "base-mkl", "anchor"]
    assert measured["base"]["scheme"] == measured["base-mkl"]["scheme"]
    assert measured["base"]["chains"] != measured["base-mkl"]["chains"]
