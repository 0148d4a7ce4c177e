"""The benchmarks run, and report what they promise. No time is asserted."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

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


def test_conditions(run, tmp_path):
    """Figures are made of what each contestant makes, and films that are there are not made again."""
    results = run("conditions", "--output_dir", tmp_path)
    assert results == json.loads((tmp_path / "conditions.json").read_text())
    assert (tmp_path / "conditions.png").stat().st_size
    for follows, figure in {"audio": "correlation", "pose": "distance"}.items():
        told = results[follows]
        assert {"command", "versions", "machine", "seed"} <= set(told) and told["films"] == 2
        assert set(told["results"]) == {"error recycling", "control"}
        for measured in told["results"].values():
            for name in (figure, f"{figure}_shuffled"):
                of_films = [values for (values,) in measured[name]["films"]]
                assert measured[name]["at"]["1"]["value"] == pytest.approx(sum(of_films) / 2, abs=1e-4)
            assert 0.5 < measured["found"]["curve"][0] <= 1
    chains = {path: path.stat().st_mtime_ns for path in (tmp_path / "chains").iterdir()}
    assert len(chains) == 8 and all(path.suffix == ".json" for path in chains)
    again = run("conditions", "--output_dir", tmp_path, "--follows", "audio")
    assert again["audio"]["results"] == results["audio"]["results"] and again["pose"] == results["pose"]
    assert chains == {path: path.stat().st_mtime_ns for path in (tmp_path / "chains").iterdir()}


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
    assert set(results) == {"memory", "append", "kills", "overlap"}
    for figures in results.values():
        assert figures["done"] and {"command", "versions", "machine", "load_before"} <= set(figures)
    (short,), (long,) = results["memory"]["peak_resident_bytes"].values()
    assert results["memory"]["ratio"] == long / short < 1.5
    append, kills = (results[name] for name in ("append", "kills"))
    # The frames are the same; the numbers in a clip's note get longer.
    assert 0.9 < append["bytes"]["ratio"] < 1.1 and len(append["curves"]["bytes"]) == append["num_clips"] == 20
    assert all(append[name]["ratio"] > 0 for name in ("seconds", "cpu_seconds", "state_seconds"))
    assert kills["equal"] == kills["films"] == 4 and kills["kills"] == sum(kills["hit"].values()) >= 4
    assert {(film["by"], film["scheme"]) for film in kills["runs"]} == {
        ("Python", "PixelMotion"),
        ("Python", "LatentMotion"),
        ("command", "PixelMotion"),
    }
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


def test_chain(run, tmp_path):
    """Both sides do the same work: the same operations, and the same film to the bit."""
    results = run("chain", "--output_dir", tmp_path)
    for measured in results.values():
        assert {"command", "seed", "versions", "machine", "figures"} <= set(measured) and measured["models"] == [
            "tiny"
        ]
    figures, peaks, cost = (results[name]["figures"] for name in ("sides", "memory", "cost"))
    figures, peaks = figures["tiny"], peaks["tiny"]
    assert figures["largest_difference"] == 0
    assert figures["flops"]["SVIPipeline"] == figures["flops"]["by hand"]
    for side in ("SVIPipeline", "by hand"):
        shares, seconds = figures["shares"][side], figures["median_seconds"][side]
        assert list(shares) == ["text", "encode", "denoise", "decode", "other"]
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        reached = figures["flops"][side]["denoise"] / seconds["denoise"]
        assert figures["share_of_ceiling"][side] == pytest.approx(reached / figures["ceiling"]["flops_a_second"])
        assert figures["frames_a_second"][side] > 0
    assert set(figures["ratio"]) == {"total", "without text", "wall"}
    # What so small a film takes may have been there before.
    both = [peaks[side] for side in ("SVIPipeline", "by hand")]
    assert max(map(abs, both)) < 50e6
    assert peaks.get("ratio") == (both[0] / both[1] if min(both) > 0 else None)
    # A clip more is as many operations as any other one; the prompt is encoded once.
    clips = cost["clips"]["lines"]["flops"]
    assert clips["slope"] == pytest.approx(sum(figures["flops"]["SVIPipeline"].values()) - clips["intercept"])
    assert clips["intercept"] == pytest.approx(figures["flops"]["SVIPipeline"]["text"])
    assert cost["pixels"]["against"] == [16**2, 32**2] and cost["frames"]["against"] == [5, 9]
    assert results == json.loads((tmp_path / "chain.json").read_text())
    assert (tmp_path / "chain.png").stat().st_size
    # What is not measured again is kept.
    again = run("chain", "--output_dir", tmp_path, "--only", "sides")
    assert again["cost"] == results["cost"] and again["memory"] == results["memory"]
    assert (
        again["sides"]["command"].endswith("--only sides") and again["sides"]["figures"] != results["sides"]["figures"]
    )


def test_a_straight_line_is_fitted_with_what_it_explains():
    chain = import_module("chain")
    assert chain.line([1, 2, 3], [5, 7, 9]) == pytest.approx({"slope": 2, "intercept": 3, "explained": 1})
    assert chain.line([1, 2, 3], [0, 1, 0]) == pytest.approx({"slope": 0, "intercept": 1 / 3, "explained": 0})


def test_operations_of_attention_and_layers_are_counted_by_phase():
    """Of a transformer of one layer by hand: products of matrices and attention; convolutions are those of patches."""
    phases, models = import_module("phases"), import_module("random_models")
    pipe = models.random_pipeline(models.MODELS["small"], "cpu", torch.float32, 0)
    watch = phases.Phases(pipe, "cpu")
    states = torch.zeros(1, 36, 2, 4, 4), torch.zeros(1), torch.zeros(1, 512, 128)
    with watch.watching(), torch.no_grad():
        _, flops = watch.flops(lambda: pipe.transformer(*states))
        _, seconds = watch.seconds(lambda: pipe.transformer(*states))
    tokens, text, inner = 8, 512, 128
    block = 4 * tokens * inner**2 + 2 * (tokens + text) * inner**2  # what the two attentions multiply
    block += 2 * tokens * inner * (tokens + text)  # their scores, and sums of values
    block += 8 * tokens * inner**2
    around = tokens * inner * (36 + 16) * 4 + text * 2 * inner**2 + 256 * inner + 7 * inner**2
    assert flops["denoise"] == 2 * (2 * block + around)
    assert seconds["denoise"] > 0 and seconds["text"] == seconds["encode"] == seconds["decode"] == 0
    assert "forward" not in vars(pipe.transformer) and "step" not in vars(pipe.scheduler)


def test_the_run_for_a_gpu_completes_on_a_cpu_and_keeps_what_is_done(monkeypatch, tmp_path):
    gpu = import_module("on_a_gpu")

    def call() -> dict:
        monkeypatch.setattr(
            sys, "argv", ["on_a_gpu.py", "--tiny", "--parts", "sides", "erft", f"--output_dir={tmp_path}"]
        )
        gpu.main()
        return json.loads((tmp_path / "gpu.json").read_text())

    results = call()
    assert {"date", "command", "versions", "machine", "aims"} <= set(results)
    sides, erft = (results["parts"][name] for name in ("sides-tiny", "erft-tiny"))
    assert sides["sides"]["num_inference_steps"] == 4 and erft["preset"] == "quick"
    figures = sides["sides"]["figures"]["tiny"]
    assert results["summary"]["sides-tiny"] == {
        "frames a second": figures["frames_a_second"]["SVIPipeline"],
        "share of the ceiling": figures["share_of_ceiling"]["SVIPipeline"],
        "over by hand": figures["ratio"]["total"]["median"],
    }
    assert results["summary"]["erft-tiny"]["over plain"] == erft["step_ratio"]
    assert call() == results


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sides", {"num_inference_steps": 4, "num_pairs": 2, "sides": ["SVIPipeline", "by hand"]}),
        ("fast4", {"num_inference_steps": 4, "num_pairs": 1, "sides": ["SVIPipeline"], "compile_blocks": True}),
        ("fast50", {"num_inference_steps": 50, "num_pairs": 1, "sides": ["SVIPipeline"], "compile_blocks": True}),
    ],
)
def test_the_parts_for_a_gpu_are_what_they_say(monkeypatch, kind, expected):
    gpu, chain = import_module("on_a_gpu"), import_module("chain")
    monkeypatch.setattr(sys, "argv", ["chain.py", "--models", "14b", *gpu.PARTS[kind]])
    args = vars(chain.parse_args())
    expected |= {"models": ["14b"], "guidance_scale": 1.0, "quick": False}
    assert {name: args[name] for name in expected} == expected


def test_the_peak_of_a_gpu_is_told_with_the_sides(monkeypatch, capsys):
    chain = import_module("chain")
    monkeypatch.setattr(sys, "argv", ["chain.py", "--device", "cuda"])
    args = chain.parse_args()
    assert args.only == ["sides", "cost"] and args.dtype == "bfloat16"
    monkeypatch.setattr(sys, "argv", ["chain.py", "--device", "cuda", "--only", "memory"])
    with pytest.raises(SystemExit):
        chain.parse_args()
    assert "on a GPU `sides` tells the peak" in capsys.readouterr().err


def test_models_for_a_gpu_have_the_published_numbers_of_parameters():
    models = import_module("random_models").MODELS
    with torch.device("meta"):
        counts = {
            name: sum(value.numel() for value in WanTransformer3DModel(**models[name].transformer).parameters())
            for name in ("1.3b", "14b")
        }
    assert counts == {"1.3b": 1_419_119_680, "14b": 16_394_878_784}
    assert all(models[name].clip == {"height": 480, "width": 832, "num_frames": 81} for name in counts)


def test_a_part_for_a_gpu_that_fails_says_why(monkeypatch, tmp_path):
    gpu = import_module("on_a_gpu")
    scripts = {
        "out of memory": "raise type('OutOfMemoryError', (RuntimeError,), {})",
        "Traceback": "raise ValueError('no')",
        "not done after": "import time; time.sleep(60)",
    }
    for expected, text in scripts.items():
        monkeypatch.setattr(gpu, "LIMIT", 2 if "sleep" in text else 60)
        (tmp_path / "script.py").write_text(text)
        outcome = gpu.measure("part", str(tmp_path / "script.py"), [], tmp_path / "figures.json")
        assert outcome["failed"].startswith(expected) and outcome["minutes"] >= 0
