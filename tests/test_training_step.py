"""One step of `examples/train_erft.py`, against its maths laid out by hand in float64, for every kind of condition."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from conftest import TEXT_DIM, load_script, make_components, seeded
from diffusers_svi.conditions.windows import windows_of
from diffusers_svi.training.step_times import StepTimes


SCRIPT = Path(__file__).parents[1] / "examples" / "train_erft.py"
# Of latents: batch, latent frames, height and width; then of the bank, and the seed of the run.
BATCH, FRAMES, HEIGHT, WIDTH = 3, 5, 4, 6
GRIDS, SHIFT, SEED = 5, 3.0, 2


@pytest.fixture(scope="module")
def train_erft():
    return load_script(SCRIPT)


def parse(train_erft, preset: str, **options):
    values = {"num_grids": GRIDS, "flow_shift": SHIFT, "seed": SEED, "bank_capacity": 4, "bank_dtype": "float32"}
    base = {"pretrained_model_name_or_path": "x", "output_dir": "y", "train_data_dir": "z", "preset": preset}
    return train_erft.parse_args([f"--{name}={value}" for name, value in {**base, **values, **options}.items()])


def make_step(train_erft, args, kind: str, dtype: torch.dtype = torch.float64):
    transformer = make_components(kind)["transformer"].to(dtype)
    timesteps, shape = torch.arange(1000), (transformer.config.out_channels, FRAMES, HEIGHT, WIDTH)
    return train_erft.TrainingStep(
        args,
        transformer=transformer,
        recycler=train_erft.make_recycler(args, PartialState(cpu=True), [shape], timesteps),
        generator=seeded(7),
        timesteps=timesteps,
        no_prompt=torch.zeros(512, TEXT_DIM),
        patch_size=(1, 2, 2),
        expand_timesteps=kind == "ti2v-5b",
        weight_dtype=dtype,
        times=StepTimes(torch.device("cpu")),
    )


def make_batch(kind: str, channels: int, held: int | None) -> dict[str, torch.Tensor]:
    generator = seeded(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    batch = {"latents": randn(channels, FRAMES, HEIGHT, WIDTH), "prompt_embeds": randn(512, TEXT_DIM)}
    for prefix in ("", "first_"):
        batch[f"{prefix}condition"] = randn(channels, held or FRAMES, HEIGHT, WIDTH)
        if kind == "wan2.1":
            batch[f"{prefix}image_embeds"] = randn(5, 16)
    return batch


def sigma_at(step: int, num_steps: int) -> float:
    u = 1 - step / num_steps
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def weight_at(step: int) -> float:
    bells = [math.exp(-2 * (sigma_at(i, 1000) - 0.5) ** 2) for i in range(1000)]
    return (bells[step] - min(bells)) / (sum(bells) / 1000 - min(bells))


@pytest.mark.parametrize(
    ("preset", "kind", "options", "held", "clean_frames", "first_error"),
    [
        ("shot", "i2v", {"n_img": 3}, None, 0, 0),
        ("film", "wan2.1", {"n_img": 2, "p_motion": 1}, None, 0, 0),
        ("pro", "i2v", {"n_img": 2}, None, 1, 0),
        ("pro", "i2v", {"n_img": 1, "img_slots": "all"}, None, 0, 0),
        ("ti2v-5b", "ti2v-5b", {"n_img": 1, "p_motion": 1, "p_text_start": 0}, 2, 1, 2),
        ("ti2v-5b", "ti2v-5b", {"num_motion_latents": 2, "n_img": 4, "p_motion": 1, "p_text_start": 0}, 3, 1, 3),
    ],
)
def test_a_step_is_its_maths(train_erft, preset, kind, options, held, clean_frames, first_error):
    """What the model is shown, what it is to say, what that costs, and what of it is banked where."""
    args = parse(train_erft, preset, p_vid=1, p_noi=1, p_img=1, p_clean=0, **options)
    step = make_step(train_erft, args, kind)
    channels = step.transformer.config.out_channels
    batch = make_batch(kind, channels, held)

    # An error in every grid, with a noise level that is not the grid's own.
    errors = torch.randn(GRIDS, channels, FRAMES, HEIGHT, WIDTH, generator=seeded(3))
    levels = [0.15 + 0.15 * grid for grid in range(GRIDS)]
    for grid in range(GRIDS):
        step.recycler.bank.put(grid, errors[grid], levels[grid], seeded())
    with torch.no_grad():
        losses, clean = step(batch)
    assert not clean.any()

    # What is drawn for noise and timesteps ...
    generator = seeded(7)
    torch.rand(2, BATCH, generator=generator, dtype=torch.float64)
    noise = torch.randn(BATCH, channels, FRAMES, HEIGHT, WIDTH, generator=generator).double()
    steps = torch.randint(1000, (BATCH,), generator=generator).tolist()
    sigmas = [sigma_at(index, 1000) for index in steps]
    # ... and for errors: switches, the grids of the condition's, places in grids of one, and where runs begin.
    generator = seeded(SEED * 1000)
    torch.rand(4, BATCH, generator=generator, dtype=torch.float64)
    img_grids = (torch.rand(BATCH, generator=generator, dtype=torch.float64) * GRIDS).long().tolist()
    torch.rand(3 * BATCH, generator=generator, dtype=torch.float64)

    noisy, conditions, targets, grids = [], [], [], []
    for sample, sigma in enumerate(sigmas):
        grid = min(range(GRIDS), key=lambda grid: abs(sigma_at(grid, GRIDS) - sigma))
        residual, level = errors[grid].double(), levels[grid]
        x_0 = batch["latents"][sample]
        corrupted = x_0 - level * residual
        eps = noise[sample] + (1 - level) * residual
        noisy.append((1 - sigma) * corrupted + sigma * eps)
        targets.append(eps - x_0)
        grids.append(grid)

        y = batch["condition"][sample].clone()
        count = min(args.n_img, y.shape[1] - clean_frames, FRAMES - first_error)
        share = torch.rand(2, generator=generator, dtype=torch.float64)[0].item()
        start = first_error + math.floor(share * (FRAMES - first_error - count + 1))
        error = -levels[img_grids[sample]] * errors[img_grids[sample]].double()
        for frame in range(count):
            y[:, clean_frames + frame] += error[:, start + frame]
        conditions.append(y)

    x, y, target = torch.stack(noisy), torch.stack(conditions), torch.stack(targets)
    prediction = predict(step, batch, x, y, sigmas, held)
    residuals = prediction - target
    if held:
        residuals[:, :, :held] = 0
    means = residuals[:, :, held or 0 :].square().flatten(1).mean(dim=1)
    weights = torch.tensor([weight_at(index) for index in steps], dtype=torch.float64)

    torch.testing.assert_close(losses.double(), weights * means, rtol=1e-4, atol=1e-6)
    counts, bank = [1] * GRIDS, step.recycler.bank
    for sample, grid in enumerate(grids):
        banked = bank.get(grid, counts[grid])
        torch.testing.assert_close(banked.residual.double(), residuals[sample], rtol=1e-4, atol=1e-4)
        assert banked.sigma == pytest.approx(sigmas[sample])
        counts[grid] += 1
    assert bank.counts.tolist() == counts


@pytest.mark.parametrize("objective", ["recycled", "restorative"])
@pytest.mark.parametrize(("preset", "kind", "held"), [("shot", "wan2.1", None), ("ti2v-5b", "ti2v-5b", 2)])
def test_a_step_with_its_own_errors_is_its_maths(train_erft, preset, kind, held, objective):
    """At high noise, the model meets what it makes of the very sample, and is to lead it back."""
    args = parse(train_erft, preset, p_vid=1, p_noi=0, p_img=0, p_clean=0, p_motion=1, objective=objective)
    args.errors, args.vid_sigmas, args.p_text_start = "self", (0.75, 1.0), 0
    step = make_step(train_erft, args, kind)
    # What it says is to depend on what it is shown.
    step.transformer.proj_out.weight.data *= 20
    batch = make_batch(kind, step.transformer.config.out_channels, held)
    with torch.no_grad():
        losses, _ = step(batch)

    generator = seeded(7)
    torch.rand(2, BATCH, generator=generator, dtype=torch.float64)
    x_0, y = batch["latents"], batch["condition"]
    noise = torch.randn(x_0.shape, generator=generator).double()
    steps = torch.randint(1000, (BATCH,), generator=generator).tolist()
    sigmas = [sigma_at(index, 1000) for index in steps]
    flawed_ones = [sigma >= 0.75 for sigma in sigmas]
    assert any(flawed_ones) and not all(flawed_ones)

    sigma = torch.tensor(sigmas, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    x = (1 - sigma) * x_0 + sigma * noise
    flawed = x - sigma * predict(step, batch, x, y, sigmas, held)
    flawed[:, :, : held or 0] = x_0[:, :, : held or 0]
    flawed = torch.where(sigma >= 0.75, flawed, x_0)
    flawed_x = (1 - sigma) * flawed + sigma * noise
    weights = torch.tensor([weight_at(index) for index in steps], dtype=torch.float64)
    alpha = weights / max(weight_at(index) for index in range(1000)) if objective == "restorative" else 0 * weights
    target = noise - x_0 + alpha.view(-1, 1, 1, 1, 1) * (flawed_x - x)
    residuals = (predict(step, batch, flawed_x, y, sigmas, held) - target)[:, :, held or 0 :]
    expected = weights * residuals.square().flatten(1).mean(dim=1)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-6)
    unharmed = predict(step, batch, x, y, sigmas, held) - (noise - x_0)
    plain = weights * unharmed[:, :, held or 0 :].square().flatten(1).mean(dim=1)
    assert [abs(one / other - 1) > 1e-3 for one, other in zip(losses, plain, strict=True)] == flawed_ones


def predict(step, batch, x, y, sigmas: list[float], held: int | None) -> torch.Tensor:
    """What the model says of noisy latents and conditions."""
    timesteps = 1000 * torch.tensor(sigmas).double()
    if held:
        hidden = torch.cat([y, x[:, :, held:]], dim=2)
        frames_of_tokens = torch.arange(FRAMES).repeat_interleave(HEIGHT // 2 * (WIDTH // 2))
        timesteps = timesteps.unsqueeze(1) * (frames_of_tokens >= held)
    else:
        mask = torch.zeros(BATCH, 4, FRAMES, HEIGHT, WIDTH).double()
        mask[:, :, 0] = 1
        hidden = torch.cat([x, mask, y], dim=1)
    with torch.no_grad():
        embeds = batch["prompt_embeds"], batch.get("image_embeds")
        return step.transformer(hidden, timesteps, *embeds, return_dict=False)[0]


def test_clean_samples_meet_no_errors_and_are_told(train_erft):
    args = parse(train_erft, "none", clean_buffer_update_prob=0)
    step = make_step(train_erft, args, "i2v")
    losses, clean = step(make_batch("i2v", 16, None))
    assert clean.all() and losses.shape == (BATCH,)
    assert step.recycler.bank.counts.sum() == 0
    step.recycler.bank.put(0, torch.ones(16, FRAMES, HEIGHT, WIDTH), 0.9, seeded())
    step.generator = seeded(7)
    assert torch.equal(step(make_batch("i2v", 16, None))[0], losses)


def test_first_clips_are_mixed_in_sample_by_sample(train_erft):
    """With their own image embeddings; in the share that is asked for."""
    step = make_step(train_erft, parse(train_erft, "shot", p_motion=0.7), "wan2.1")
    batch, goes_on = make_batch("wan2.1", 16, None), []
    for _ in range(200):
        draws = seeded()
        draws.set_state(step.generator.get_state())
        condition, image_embeds, _ = step.choose_condition(batch)
        expected = torch.rand(2, BATCH, generator=draws, dtype=torch.float64)[0] < 0.7
        for sample, on in enumerate(expected.tolist()):
            prefix = "" if on else "first_"
            assert torch.equal(condition[sample], batch[f"{prefix}condition"][sample])
            assert torch.equal(image_embeds[sample], batch[f"{prefix}image_embeds"][sample])
        goes_on += expected.tolist()
    # Within five standard deviations of 600 draws.
    assert abs(sum(goes_on) / 600 - 0.7) < 5 * 0.0187


@pytest.mark.parametrize("repeat_first", [False, True])
def test_the_mask_of_a_sample_is_that_of_its_clip(train_erft, repeat_first):
    """With `--mask_frames all`: five frames where a sample goes on, one where it begins, five if that is repeated."""
    args = parse(train_erft, "film", p_motion=0.5)
    args.mask_frames, args.repeat_first_frame = "all", repeat_first
    step = make_step(train_erft, args, "i2v", torch.float32)
    seen, marked = [], []
    step.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    batch = {name: value.float() for name, value in make_batch("i2v", 16, None).items()}
    for _ in range(4):
        draws = seeded()
        draws.set_state(step.generator.get_state())
        marked.append(torch.rand(2, BATCH, generator=draws, dtype=torch.float64)[0] < 0.5)
        with torch.no_grad():
            step(batch)
    assert 0 < torch.cat(marked).float().mean() < 1
    for hidden, goes_on in zip(seen, marked, strict=True):
        for sample, on in enumerate(goes_on.tolist()):
            expected = torch.zeros(4, FRAMES, HEIGHT, WIDTH)
            # Frame 0, and the four of the second latent frame.
            expected[:, : 2 if on or repeat_first else 1] = 1
            assert torch.equal(hidden[sample, 16:20], expected)


def test_a_batch_of_held_latents_begins_in_one_way(train_erft):
    """On from another clip, as a first clip, or from text alone: then nothing is held."""
    step = make_step(train_erft, parse(train_erft, "ti2v-5b", p_motion=0.6, p_text_start=0.25), "ti2v-5b")
    batch = make_batch("ti2v-5b", 48, 2)
    batch["first_condition"] = batch["first_condition"][:, :, :1]
    lengths = []
    for _ in range(600):
        draws = seeded()
        draws.set_state(step.generator.get_state())
        condition, image_embeds, _ = step.choose_condition(batch)
        # The first sample decides for all.
        first, text = torch.rand(2, BATCH, generator=draws, dtype=torch.float64)[:, 0].tolist()
        lengths.append(condition.shape[2])
        assert lengths[-1] == (0 if text < 0.25 else 2 if first < 0.6 else 1)
        assert image_embeds is None
        assert lengths[-1] == 0 or torch.equal(
            condition, batch["condition" if lengths[-1] == 2 else "first_condition"]
        )
    for length, share in ((0, 0.25), (2, 0.75 * 0.6), (1, 0.75 * 0.4)):
        assert abs(lengths.count(length) / 600 - share) < 5 * math.sqrt(share * (1 - share) / 600)


def test_a_share_of_the_prompts_is_empty(train_erft):
    step = make_step(train_erft, parse(train_erft, "shot", proportion_empty_prompts=0.3), "i2v")
    batch, empty = make_batch("i2v", 16, None), 0
    for _ in range(200):
        for sample, embeds in enumerate(step.choose_prompt(batch)):
            is_empty = not embeds.any()
            assert is_empty or torch.equal(embeds, batch["prompt_embeds"][sample])
            empty += is_empty
    assert abs(empty / 600 - 0.3) < 5 * 0.0187


def test_an_experts_timesteps_stay_on_its_side(train_erft):
    """And so do the grids of its bank, which take no room for the other's."""
    sigmas = torch.tensor([sigma_at(step, 1000) for step in range(1000)], dtype=torch.float64)
    indices = {}
    for expert in ("high", "low"):
        args = parse(train_erft, "pro", expert=expert)
        indices[expert] = train_erft.training_timesteps(args, 0.9)
        recycler = train_erft.make_recycler(args, PartialState(cpu=True), [(1, 2)], indices[expert])
        reached = {
            min(range(GRIDS), key=lambda grid: abs(sigma_at(grid, GRIDS) - sigmas[index].item()))
            for index in indices[expert].tolist()
        }
        assert set(recycler.bank.first_slot) == reached and 0 < len(reached) < GRIDS
    assert sigmas[indices["high"]].min() >= 0.9 > sigmas[indices["low"]].max()
    assert sorted([*indices["high"].tolist(), *indices["low"].tolist()]) == list(range(1000))


@pytest.mark.parametrize("preset", ["talk", "dance"])
def test_a_step_hears_or_sees_and_leaves_out_a_share(train_erft, preset):
    """Samples without image have neither picture, mask nor errors on it; each thing is left out by itself."""
    args = parse(train_erft, preset, p_vid=0, p_noi=0, p_img=1, p_clean=0, p_no_condition=0.5, p_no_image=0.5)
    step = make_step(train_erft, args, "wan2.1")
    args.condition_modules, args.train_condition_modules = "init", True
    condition = train_erft.find_condition(args, Path("nowhere"), {}, None, torch.device("cpu"))
    step.transformer = condition.modules.put_on(step.transformer, 6 if preset == "talk" else None)
    step.following = condition.following
    batch = make_batch("wan2.1", 16, None)
    rows = (21, 2, 3) if preset == "talk" else (17, 8 * HEIGHT, 8 * WIDTH, 3)
    batch[args.condition] = torch.randint(1, 256, (BATCH, *rows), generator=seeded(4), dtype=torch.uint8)
    if preset == "talk":
        batch["audio"] = batch["audio"].double()
    for grid in range(GRIDS):
        step.recycler.bank.put(grid, torch.ones(16, FRAMES, HEIGHT, WIDTH), 0.5, seeded())
    given = {}
    step.transformer.register_forward_pre_hook(lambda _model, _inputs, kwargs: given.update(kwargs), with_kwargs=True)
    losses, _ = step(batch)
    assert losses.isfinite().all()

    generator = seeded(7)
    torch.rand(2, BATCH, generator=generator, dtype=torch.float64)
    left_out, no_image = (torch.rand(2, BATCH, generator=generator, dtype=torch.float64) < 0.5).tolist()
    assert {*left_out} == {*no_image} == {True, False}
    noise = torch.randn(BATCH, 16, FRAMES, HEIGHT, WIDTH, generator=generator).double()
    steps = torch.randint(1000, (BATCH,), generator=generator).tolist()
    for sample, step_index in enumerate(steps):
        sigma = sigma_at(step_index, 1000)
        noisy, mask, y = given["hidden_states"][sample].split([16, 4, 16])
        expected = (1 - sigma) * batch["latents"][sample] + sigma * noise[sample]
        torch.testing.assert_close(noisy, expected, rtol=1e-4, atol=1e-6)
        followed = given["attention_kwargs"]
        if preset == "talk":
            heard = windows_of(batch["audio"][sample])
            assert torch.equal(followed["audio"][sample], torch.zeros_like(heard) if left_out[sample] else heard)
        else:
            assert followed["pose_weight"][sample] == (0 if left_out[sample] else 1)
            assert torch.equal(followed["pose"][sample], batch["pose"][sample].permute(3, 0, 1, 2) / 255)
        embeds = given["encoder_hidden_states_image"][sample]
        if no_image[sample]:
            assert not mask.any() and not y.any() and not embeds.any()
            continue
        error = torch.zeros_like(y)
        error[:, : 3 if preset == "talk" else 1] = -0.5
        torch.testing.assert_close(y, batch["condition"][sample] + error)
        assert torch.equal(embeds, batch["image_embeds"][sample])
        assert mask[:, 0].all() and not mask[:, 1:].any()
