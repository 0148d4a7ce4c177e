"""The benchmarks run, and report what they promise. No time is asserted."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from diffusers_svi import PixelMotion


SVI_TINY = Path(__file__).parents[1] / "examples" / "svi_tiny"
COMMON = {"command", "versions", "machine", "median_seconds", "peak_resident_bytes"}


@pytest.fixture
def run(monkeypatch, capsys):
    """From the name of a benchmark and options to the last line that it prints."""

    def main(name: str, *options) -> dict:
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", "--quick", "--json", *map(str, options)])
        import_module(name).main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return main


def test_error_bank(run, tmp_path):
    """Of so few errors all are compared in full, so every victim is the exact one."""
    file = tmp_path / "new" / "figures.json"
    results = run("error_bank", "--dtype", "int8", "--num_replacements", 9, "--output_file", file)
    assert results == json.loads(file.read_text())
    assert COMMON | {"eviction_speedup", "published_replacements", "seconds_range"} <= set(results)
    assert results["victim_agreement"] == 1 and results["victim_agreement_of"] == {"relative": 1, "new_video": 1}
    assert 0 <= results["published_victim_agreement"] <= 1
    assert results["eviction_speedup"] > 0 and results["replacements"] == 9
    assert results["capacity"] == 10 and results["dtype"] == "int8" and len(results["error_shape"]) == 4
    nearest = results["median_nearest_distance"]
    assert 0 < nearest["relative"] < nearest["new_video"]
    errors = results["reconstruction_error"]
    assert errors["float32"] == 0 and 0 < errors["bfloat16"] < errors["int8"] < 0.02


def test_error_bank_with_residuals_of_a_model(run):
    options = ("--capacity", 5, "--num_replacements", 2, "--num_published", 1)
    results = run("error_bank", "--model_dir", SVI_TINY / "model", *options)
    assert results["errors"].startswith("residuals of") and results["victim_agreement"] == 1
    assert results["median_nearest_distance"]["relative"] < results["median_nearest_distance"]["new_video"]


def test_erft_step(run):
    results = run("erft_step")
    assert COMMON | {"step_ratio", "recycling_share", "plain_seconds", "erft_seconds"} <= set(results)
    assert results["step_ratio"] > 0 and 0 < results["recycling_share"] < 1
    assert results["bank"]["full"] and results["bank"]["capacity"] == 4
    assert set(results["erft_seconds"]) == {"total", "inject", "recycle"}
    assert results["trained_parameters"] > 0 and results["preset"] == "quick"


def test_fused_lora(run):
    results = run("fused_lora", "--lora", SVI_TINY / "loras" / "shot.safetensors")
    assert COMMON | {"clip_ratio", "scheme", "num_clips"} <= set(results)
    assert results["clip_ratio"] > 0 and results["scheme"] == str(PixelMotion(1, padding="reference"))


def test_film(run, tmp_path):
    """The bytes are the same whatever was done to the run; what was measured once is kept."""
    results = run("film", "--output_dir", tmp_path)
    assert set(results) == {"memory", "append", "kills", "stream", "overlap"}
    for figures in results.values():
        assert figures["done"] and {"command", "versions", "machine", "load_before"} <= set(figures)
    (short,), (long,) = results["memory"]["peak_resident_bytes"].values()
    assert results["memory"]["ratio"] == long / short < 1.5
    append, kills, stream = (results[name] for name in ("append", "kills", "stream"))
    # The frames are the same; the numbers in a clip's note get longer.
    assert 0.9 < append["bytes"]["ratio"] < 1.1 and len(append["curves"]["bytes"]) == append["num_clips"] == 20
    assert all(append[name]["ratio"] > 0 for name in ("seconds", "cpu_seconds", "state_seconds"))
    assert kills["equal"] == kills["films"] == 4 and kills["kills"] == sum(kills["hit"].values()) >= 4
    assert {(film["by"], film["scheme"]) for film in kills["runs"]} == {
        ("Python", "PixelMotion"),
        ("Python", "LatentMotion"),
        ("command", "PixelMotion"),
    }
    assert stream["frames_equal"] and all(ratio["median"] > 0 for ratio in stream["ratio"].values())
    assert results["overlap"]["bytes_equal"] and results["overlap"]["ratio"] > 0
    assert (tmp_path / "film.png").stat().st_size
    assert run("film", "--output_dir", tmp_path) == results == json.loads((tmp_path / "film.json").read_text())


def test_memory(run, tmp_path):
    results = run("memory", "--output_dir", tmp_path)
    assert {"command", "versions", "machine"} <= set(results) and set(results["runs"]) == {"clip", "step"}
    for (figures,) in results["runs"].values():
        assert figures["planned_over_measured"] == figures["planned_bytes"] / figures["measured_bytes"] > 0
    assert results["runs"]["step"][0]["at_the_peak"] == "step"
    assert results == json.loads((tmp_path / "memory.json").read_text())
    assert (tmp_path / "memory.png").stat().st_size
