"""The world of vectors, how its models are trained, and what is measured of them."""

import json
import sys

import PIL.Image
import pytest
import recycling
import torch
from vector_training import CONTESTANTS, PUBLISHED, Contestant, WhiteBank, make_model, make_recycler
from vectors import CHANNELS, FRAMES, IDENTITIES, SPEEDS, World

from diffusers_svi.erft import ErrorBank


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def clips(world):
    return world.clips(64, torch.Generator().manual_seed(0))


def test_a_clip_moves_over_the_surface_as_its_prompt_tells(world, clips):
    assert clips.latents.shape == (64, CHANNELS, FRAMES, 1, 1)
    last = clips.angles + (FRAMES - 1) * SPEEDS[clips.prompts]
    torch.testing.assert_close(clips.latents[:, :, -1, 0, 0], world.points(last, clips.identities))
    assert set(clips.prompts.tolist()) == set(range(len(SPEEDS)))
    assert set(clips.identities.tolist()) == set(range(IDENTITIES))


def test_true_frames_are_on_the_surface_and_tell_their_identity(world, clips):
    distance, identity = world.nearest(clips.latents[:, :, 3, 0, 0])
    assert distance.max() < 0.01  # between two angles of the grid
    assert torch.equal(identity, clips.identities)


def test_the_surface_has_mean_0_and_deviation_09(world):
    angles, identities = torch.rand(2, 50000, generator=torch.Generator().manual_seed(1)) * IDENTITIES
    points = world.points(angles * 2 * torch.pi / IDENTITIES, identities)
    # Four standard errors of the difference to the 20,000 points that say so.
    assert points.mean(0).abs().max() < 4 * (1 / 20000 + 1 / 50000) ** 0.5
    assert abs(points.std() - 0.9) < 0.02


def test_an_error_off_the_surface_is_as_far_from_it_as_it_is_large(world, clips):
    direction = world.errors("off", clips, torch.Generator().manual_seed(0))
    torch.testing.assert_close(direction.square().mean(1), torch.ones(64))
    distance, _ = world.nearest(clips.latents[:, :, 0, 0, 0] + 0.05 * direction)
    torch.testing.assert_close(distance, torch.full((64,), 0.05), atol=0.004, rtol=0)


@pytest.mark.parametrize("kind", ["identity", "angle"])
def test_errors_along_the_surface_stay_on_it(world, clips, kind):
    """To first order: compared with the points a little further along it."""
    direction = world.errors(kind, clips, torch.Generator().manual_seed(0))
    torch.testing.assert_close(direction.square().mean(1), torch.ones(64))
    step = 1e-3
    moved = (clips.angles, clips.identities + step) if kind == "identity" else (clips.angles + step, clips.identities)
    along = (world.points(*moved) - clips.latents[:, :, 0, 0, 0]) / step
    cosine = torch.nn.functional.cosine_similarity(along, direction, dim=1)
    torch.testing.assert_close(cosine.abs(), torch.ones(64), atol=2e-3, rtol=0)
    assert set(cosine.sign().tolist()) == {-1.0, 1.0}


def test_white_noise_has_the_size_of_the_error_it_stands_for():
    contestant = Contestant(injection=PUBLISHED, white=True)
    white, plain = make_recycler(contestant, 0).bank, make_recycler(Contestant(injection=PUBLISHED), 0).bank
    assert isinstance(white, WhiteBank) and type(plain) is ErrorBank
    sizes = torch.arange(1.0, FRAMES + 1)[None, None, :, None, None]
    residuals = sizes * torch.randn(1, CHANNELS, FRAMES, 1, 1, generator=torch.Generator().manual_seed(0))
    for bank in (white, plain):
        bank.add(residuals, torch.tensor([0.5]), torch.tensor([True]), torch.Generator())
    grid = int(plain.filled().nonzero())
    drawn = torch.stack([white.get(grid, 0).residual for _ in range(500)])
    expected = residuals[0].square().mean(dim=0)
    torch.testing.assert_close(drawn.square().mean(dim=(0, 1)), expected, rtol=0.1, atol=0)
    assert drawn.mean(dim=0).abs().max() < 1.5  # another draw every time, not the error
    assert torch.equal(plain.get(grid, 0).residual, residuals[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("E_img alone", (0.0, 0.0, 0.9)),
        ("E_vid alone", (0.9, 0.0, 0.0)),
        ("E_noi alone", (0.0, 0.9, 0.0)),
        ("published", (0.9, 0.01, 0.9)),
    ],
)
def test_contestants_inject_what_their_names_say(name, expected):
    config = make_recycler(CONTESTANTS[name], 0).injection
    assert (config.p_vid, config.p_noi, config.p_img) == expected
    assert config.p_clean == 0.2 and config.n_img == 1


def test_a_slope_is_what_is_left_over_what_was_put_in(world):
    """Of a transformer that predicts nothing, every clip is its noise: nothing is left of any error."""
    model = make_model()
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    assert recycling.measure_slopes(model, world, 8, (0.1, 0.5)) == {kind: [0.0, 0.0] for kind in recycling.ERRORS}
    # What is left of a small error is in proportion to it, and so the slope the same.
    small, twice = recycling.measure_slopes(make_model(), world, 8, (1e-3, 2e-3))["off"]
    assert small > 0.01 and abs(small / twice - 1) < 0.05


def test_intervals_are_those_of_student():
    assert recycling.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == [3.0, 1.9632]
    assert recycling.interval([2.5]) == [2.5, 0.0]


def test_every_run_has_files_of_its_own(tmp_path):
    files = [file for name in CONTESTANTS for seed in (0, 1) for file in recycling.files_of(tmp_path, name, seed)]
    assert len(set(files)) == 4 * len(CONTESTANTS)
    assert recycling.files_of(tmp_path, "p_clean 0.5", 1)[0] == tmp_path / "runs" / "p_clean_0.5-1.json"


def test_bars_tell_what_fails():
    def found(identity, distance, motion, seed):
        return {
            "key": {"seed": seed},
            "identity": [1.0, identity],
            "distance": [0.02, distance],
            "motion": [0, motion],
        }

    runs = {
        "control": [found(0.7, 0.05, 1.0, 0), found(0.81, 0.05, 1.0, 1)],
        "published": [found(0.99, 0.026, 0.96, 0), found(0.97, 0.03, 0.94, 1)],
    }
    first, second = recycling.check_bars(runs)
    assert first == {
        "seed": 0,
        "identity": 0.99,
        "control_identity": 0.7,
        "distance_growth": 1.3,
        "motion": 0.96,
        "fails": [],
    }
    assert second["fails"] == ["identity", "control_identity", "distance_growth", "motion"]


def test_contestants_are_added_to_figures_that_are_there():
    def found(minutes, bars, **values):
        rows = {name.replace("_", " "): {"seeds": value} for name, value in values.items()}
        return {"made": [{"minutes": minutes}], "table": rows, "bars": bars, "curves": rows}

    earlier = found(700, [{"seed": 0}], base=5, control=5, published=5, bank_of_8=1)
    later = found(20, [], base=2, white_noise=2, bank_of_8=2)
    both = recycling.add_to(earlier, later, ["white noise", "bank of 8"])
    counts = {name: row["seeds"] for name, row in both["table"].items()}
    assert counts == {"base": 5, "control": 5, "published": 5, "white noise": 2, "bank of 8": 2}
    assert list(counts) == ["base", "control", "published", "white noise", "bank of 8"]
    assert both["curves"] == both["table"] and both["bars"] == [{"seed": 0}]
    assert both["made"] == [{"minutes": 700}, {"minutes": 20}]


@pytest.mark.parametrize(
    ("options", "earlier", "message"),
    [
        (["control", "--seeds", "0"], {}, "`--contestants`: control and published are compared, name both"),
        (["white noise", "--seeds", "0"], None, "`--contestants`: control and published are compared, name both"),
        (["white noise", "--seeds", "4"], {}, "`--ablation_seeds`: none of the `--seeds` is one of them"),
        (["white noise", "--seeds", "0"], {"white noise": {"seeds": 2}}, "has more `--seeds` of white noise than 1"),
    ],
)
def test_what_gives_no_report_is_refused_first(monkeypatch, tmp_path, options, earlier, message):
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"table": earlier}))
    added = [] if earlier is None else ["--add_to", str(file)]
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--output_dir", str(tmp_path), *added, "--contestants", *options)
    assert not (tmp_path / "runs").exists()


def run(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/recycling.py", *options])
    recycling.main()


def test_quick_makes_the_figures(monkeypatch, tmp_path, capsys):
    """300 steps after 100 of the base: what they show is nothing, that they show it is the claim."""
    run(monkeypatch, "--quick", "--output_dir", str(tmp_path))
    results = json.loads((tmp_path / "recycling.json").read_text())
    assert list(results["table"]) == ["base", "control", "published", "white noise"]
    published = results["table"]["published"]
    assert published["seeds"] == results["table"]["white noise"]["seeds"] == 1
    assert set(published["distance"]) == {"1", "6"} and published["long"]["clips"] == 8
    assert set(published["slopes"]["off"]) == {str(size) for size in recycling.SIZES}
    assert "long" not in results["table"]["white noise"]
    assert [bar["seed"] for bar in results["bars"]] == [0]
    assert results["settings"]["steps"] == 300 and results["made"][0]["command"].endswith(f"--output_dir {tmp_path}")
    figures = json.loads((tmp_path / "runs" / "published-0.json").read_text())
    assert list(figures["watched"]) == ["0", "150", "300"] and len(figures["identity"]) == 6
    assert figures["watched"]["300"]["off"] == figures["slopes"]["off"][recycling.SIZES.index(recycling.WATCHED)]
    shown = results["curves"]["published"]
    assert shown["watched_steps"] == [0, 150, 300] and shown["long_clips"] == list(range(1, 9))
    assert shown["identity"] == [recycling.rounded(figures["identity"])]
    assert shown["long_distance"] == [recycling.rounded(figures["long"]["distance"])]
    assert shown["watched_off"] == [recycling.rounded([one["off"] for one in figures["watched"].values()])]
    assert PIL.Image.open(tmp_path / "recycling.png").size[0] > 1200
    assert "published            clip 6: distance" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**results, "table": {**results["table"], "bank of 8": {**published, "seeds": 3}}}))
    run(monkeypatch, "--quick", "--output_dir", str(tmp_path), "--add_to", str(other))
    added = json.loads((tmp_path / "recycling.json").read_text())
    assert added["table"].pop("bank of 8") == {**published, "seeds": 3}
    assert added["table"] == results["table"] and added["made"] == results["made"] + added["made"][1:]
    assert len(added["made"]) == 2 and added["bars"] == results["bars"]
    other.write_text(json.dumps({**results, "settings": {"steps": 400}}))
    with pytest.raises(SystemExit, match=r"`--add_to`: .*other\.json has other settings, \{'steps': 400\}"):
        run(monkeypatch, "--quick", "--output_dir", str(tmp_path), "--add_to", str(other))
    # What is there is not made again, and with other settings it is not taken for theirs.
    (tmp_path / "runs" / "base-0.safetensors").unlink()
    run(monkeypatch, "--quick", "--output_dir", str(tmp_path))
    assert json.loads((tmp_path / "recycling.json").read_text())["table"] == results["table"]
    base = tmp_path / "runs" / "base-0.json"
    base.write_text(base.read_text().replace('"num_chains": 8', '"num_chains": 9'))
    with pytest.raises(SystemExit, match=r"base-0\.json was made with other settings"):
        run(monkeypatch, "--quick", "--output_dir", str(tmp_path))
