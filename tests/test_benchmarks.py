"""The benchmarks run, and report what they promise. No time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

from diffusers_svi import PixelMotion


ROOT = Path(__file__).parents[1]
COMMON = {"command", "versions", "machine", "median_seconds", "peak_resident_bytes"}


def run(name: str, *arguments) -> dict:
    """The last line printed by a benchmark."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1])


def test_error_bank(tmp_path):
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


def test_error_bank_with_residuals_of_a_model():
    options = ("--capacity", 5, "--num_replacements", 2, "--num_published", 1)
    results = run("error_bank", "--model_dir", ROOT / "examples" / "svi_tiny" / "model", *options)
    assert results["errors"].startswith("residuals of") and results["victim_agreement"] == 1
    assert results["median_nearest_distance"]["relative"] < results["median_nearest_distance"]["new_video"]


def test_erft_step():
    results = run("erft_step")
    assert COMMON | {"step_ratio", "recycling_share", "plain_seconds", "erft_seconds"} <= set(results)
    assert results["step_ratio"] > 0 and 0 < results["recycling_share"] < 1
    assert results["bank"]["full"] and results["bank"]["capacity"] == 4
    assert set(results["erft_seconds"]) == {"total", "inject", "recycle"}
    assert results["trained_parameters"] > 0 and results["preset"] == "quick"


def test_fused_lora():
    results = run("fused_lora", "--lora", ROOT / "examples" / "svi_tiny" / "loras" / "shot.safetensors")
    assert COMMON | {"clip_ratio", "scheme", "num_clips"} <= set(results)
    assert results["clip_ratio"] > 0 and results["scheme"] == str(PixelMotion(1, padding="reference"))
