"""The memory plan: its formulas against what diffusers' own modules allocate at the true shapes, and by hand."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from peft import LoraConfig

from diffusers_svi.erft import BankConfig
from diffusers_svi.lora_file import TARGET_MODULES
from diffusers_svi.memory import CARDS, Clip, Training, inference_memory, model_shapes, training_memory
from diffusers_svi.memory.activations import Tokens, block_peak, decode_peak, encode_peak, training_peak
from diffusers_svi.memory.inference import OFFLOADS, tokens_of, what_fits
from diffusers_svi.memory.model import FORMATS
from diffusers_svi.published import PUBLISHED
from live_memory import LiveMemory, flash  # noqa: F401 - a fixture


W21, A14B, W5B = "wan2.1-i2v-14b-480p", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def shapes():
    return {name: model_shapes(name) for name in (W21, A14B, W5B)}


def traced(name, shapes, dtype, num_layers, rank=128, precision=None, checkpointing=False) -> tuple[int, Tokens]:
    """Bytes alive at the worst moment of the true transformer's first blocks, on a clip of the true size."""
    config, model = {**PUBLISHED[name].transformer, "num_layers": num_layers}, shapes[name]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            transformer = WanTransformer3DModel(**config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    tokens = tokens_of(model, *model.size, dtype.itemsize)
    with torch.device("meta"):
        if rank:
            transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGET_MODULES))
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.float32 if precision == "autocast" else dtype)
        _, *size = model.latent_shape(*model.size)
        latents = torch.empty(1, config["in_channels"], *size, dtype=dtype)
        timestep = torch.empty(1, tokens.count) if model.expand_timesteps else torch.empty(1)
        prompt = torch.empty(1, 512, 4096, dtype=dtype)
        image = torch.empty(1, 257, 1280, dtype=dtype) if "image_dim" in config else None
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train(precision is not None)
    given = [latents, timestep, prompt, *([] if image is None else [image])]
    live = LiveMemory([*transformer.parameters(), *transformer.buffers(), *given])
    autocast = torch.autocast("cpu", BF16) if precision == "autocast" else nullcontext()
    with live, torch.set_grad_enabled(precision is not None):
        with autocast:
            output = transformer(latents, timestep, prompt, image, return_dict=False)[0]
        if precision is not None:
            output.float().square().mean().backward()
    return live.peak, tokens


@pytest.mark.parametrize("rank", [0, 128])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [W21, A14B, W5B])
def test_denoising_takes_what_diffusers_allocates_at_the_true_shapes(name, dtype, rank, shapes, flash):  # noqa: F811
    live, tokens = traced(name, shapes, dtype, num_layers=2, rank=rank)
    assert block_peak(tokens, rank) == pytest.approx(live, rel=0.02)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "none"])
@pytest.mark.parametrize("precision", ["float32", "half", "autocast"])
@pytest.mark.parametrize("name", [A14B, W5B])
def test_a_step_takes_what_diffusers_allocates_at_the_true_shapes(name, precision, checkpointing, shapes, flash):  # noqa: F811
    dtype = torch.float32 if precision == "float32" else BF16
    live, tokens = traced(name, shapes, dtype, 3, precision=precision, checkpointing=checkpointing)
    # Beside the activations the trace has the gradients of the LoRA.
    assert training_peak(tokens, 3, 128, precision, checkpointing) == pytest.approx(live, rel=0.05)


@pytest.mark.parametrize("name", [A14B, W5B])
def test_the_vae_takes_what_diffusers_allocates_at_the_true_shapes(name, shapes):
    _, height, width = shapes[name].size
    with torch.device("meta"):
        vae = AutoencoderKLWan(**PUBLISHED[name].vae)
        video = torch.empty(1, 3, 9, height, width)
        latents = torch.empty(1, *shapes[name].latent_shape(9, height, width))
    for run, given, planned in ((vae.encode, video, encode_peak), (vae.decode, latents, decode_peak)):
        live = LiveMemory([*vae.parameters(), *vae.buffers(), given])
        with live, torch.no_grad():
            run(given)
        assert planned(shapes[name].vae, 9, height, width) == pytest.approx(live.peak, rel=0.1)


def test_a_small_block_by_hand():
    tokens = Tokens(count=1000, width=64, inner=256, heads=4, context=10, itemsize=2)
    beside = 4 * 10 * 64 * 2 + 2 * 1000 * 16 * 4
    # With a LoRA: four of d and three of f in bfloat16; without, the residual: five of d, and three in float32.
    assert block_peak(tokens, rank=4) == 2 * 1000 * (4 * 64 + 3 * 256) + beside
    assert block_peak(tokens) == max(2 * 1000 * (4 * 64 + 2 * 256), 1000 * 64 * (5 * 2 + 3 * 4)) + beside
    assert block_peak(tokens, attention="math") == 6 * 1000 * 64 * 2 + 2 * 4 * 1000**2 * 2 + beside


def test_weights_by_their_form(shapes):
    weights = shapes[A14B].weights["transformer"]
    whole, in_blocks = weights.num_bytes(BF16), weights.in_blocks
    assert whole == 2 * weights.count + 2 * weights.in_float32
    assert [round(32 * FORMATS[form]) for form in ("Q8_0", "Q4_0", "Q4_K", "4bit")] == [34, 18, 18, 18]
    for form in ("fp8", "Q8_0", "Q4_K"):
        assert weights.num_bytes(BF16, form) == whole - round(in_blocks * (2 - FORMATS[form]))
    assert weights.lora_count(128) == 128 * 40 * (8 * (5120 + 5120) + 2 * (5120 + 13824))


def test_what_lies_on_the_gpu_in_each_way_of_offloading(shapes):
    model = shapes[A14B]
    plans = {way: inference_memory(model, Clip(num_frames=81, height=480, width=832, offload=way)) for way in OFFLOADS}
    lora = 2 * 613_416_960
    parts = {way: {phase.name: phase.parts for phase in plan.phases} for way, plan in plans.items()}
    stored = {name: size + (lora if "transformer" in name else 0) for name, size in model.num_bytes(BF16).items()}
    assert {name: parts["none"]["decode"][name] for name in stored} == stored
    # The VAE has encoded the start of the clip, and stays until the clip is done; the text encoder until then.
    kept = {"transformer_2", "vae", "activations", "latents and prompts"}
    assert parts["model"]["denoise 2"].keys() == kept and "text_encoder" in parts["model"]["encode"]
    # A layer at a time; the text encoder's largest is its vocabulary.
    assert parts["group"]["text"]["layers"] == 2 * 256384 * 4096
    assert parts["group+streams"]["text"]["layers"] == 2 * parts["group"]["text"]["layers"]
    assert {plan.host["weights"] for way, plan in plans.items() if way != "none"} == {sum(stored.values())}
    peaks = [plans[way].gpu_bytes for way in ("none", "model", "group+streams", "group")]
    assert peaks == sorted(peaks, reverse=True)


def test_what_makes_a_film_fit(shapes):
    clip = Clip(num_frames=81, height=480, width=832)
    way = what_fits(shapes[A14B], clip, 24, ("fp8", "Q4_K"))
    assert way is not None and inference_memory(shapes[A14B], way).fits(24)
    assert not inference_memory(shapes[A14B], clip).fits(24) and inference_memory(shapes[A14B], clip).fits(80)
    assert what_fits(shapes[A14B], clip, 1, ("fp8", "Q4_K")) is None
    assert CARDS == (12, 24, 80)


def test_optimizer_and_bank_by_hand(shapes):
    size = {"num_frames": 81, "height": 480, "width": 832}
    lora, base = 613_416_960, shapes[A14B].weights["transformer"].num_bytes(BF16)

    def step(**options):
        plan = training_memory(shapes[A14B], Training(**size, **options))
        return plan, plan.phases[-1].parts

    _, alone = step()
    assert alone["LoRA"] + alone["gradients"] + alone["optimizer"] == 16 * lora and alone["base"] == base
    _, two = step(zero=2, num_processes=8)
    assert (two["LoRA"], two["optimizer"], two["base"]) == (2 * lora, 12 * lora // 8, base)
    assert two["gradients"] == 2 * lora // 8 + 10**9
    plan, three = step(zero=3, num_processes=8)
    assert plan.phases[-2].parts == {"base": base // 8, "LoRA": 2 * lora // 8}
    assert three["base"] == base // 8 and three["weights put together"] == 2 * 10**9
    for dtype in ("float32", "bfloat16", "int8"):
        bank = BankConfig(dtype=dtype)
        plan, _ = step(num_processes=8, bank=bank)
        # Of the experts, of 19 and of 32 grids, the larger; one grid has errors of both.
        assert plan.host["error banks of 8 processes"] == 8 * bank.num_bytes((16, 21, 60, 104), 32)
    assert [phase.name for phase in step(is_cached=True)[0].phases] == ["load", "step"]
    assert step(quantize_base="4bit")[1]["base"] < 0.3 * base
    assert step(quantize_base="int8")[1]["base"] == step(quantize_base="8bit")[1]["base"]
    plan, few = step(group_offload=True)
    # 38 of 40 blocks, of ten linear layers each, are on the CPU: four of 5120 twice, and the feed-forward's.
    assert few["base"] == base - 2 * 38 * (8 * 5120**2 + 2 * 5120 * 13824)
    assert plan.phases[-2].parts["base"] == few["base"] and plan.host["base"] == base


def test_what_two_experts_and_several_buckets_need(shapes):
    size = {"num_frames": 49, "height": 480, "width": 832}
    one, shape = Training(**size), (16, 13, 60, 104)
    lora = 613_416_960
    base, quantized = (shapes[A14B].weights["transformer"].num_bytes(BF16, form) for form in ("none", "8bit"))
    for options, weights, on_the_gpu in (
        ({}, base, 0),
        ({"quantize_base": "8bit"}, quantized, quantized + 4 * lora),
        ({"group_offload": True}, base, base - 2 * 40 * (8 * 5120**2 + 2 * 5120 * 13824) + 4 * lora),
    ):
        alone, pair = (
            training_memory(shapes[A14B], replace(one, **options, both_experts=both)) for both in (False, True)
        )
        parts = dict(pair.phases[-1].parts)
        assert parts.pop("the other expert", 0) == on_the_gpu and parts == alone.phases[-1].parts
        assert pair.host["the other expert"] == weights + 12 * lora - on_the_gpu
        assert pair.host["error bank"] == one.bank.num_bytes(shape, 19 + 32)

    # Activations of the longest; a bank of each.
    longest = Training(**{**size, "num_frames": 81})
    both = training_memory(shapes[A14B], replace(one, more_buckets=((81, 480, 832),)))
    wanted = training_memory(shapes[A14B], longest)
    assert both.phases == wanted.phases != training_memory(shapes[A14B], one).phases
    assert both.host["error bank"] == one.bank.num_bytes(shape, 32) + wanted.host["error bank"]
    with pytest.raises(ValueError, match="`both_experts`: .* has one transformer only"):
        training_memory(shapes[W21], replace(one, both_experts=True))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"zero": 1}, "`zero` must be 2 or 3"),
        ({"zero": 3, "quantize_base": "4bit"}, "quantized weights cannot be dealt out"),
        ({"zero": 2, "quantize_base": "fp8"}, "`quantize_base`='fp8' goes without DeepSpeed, got `zero`=2"),
        ({"zero": 2, "group_offload": True}, "`group_offload` needs gradient checkpointing, and goes neither"),
        ({"quantize_base": "8bit", "group_offload": True}, "`group_offload` needs gradient checkpointing"),
        ({"gradient_checkpointing": False, "group_offload": True}, "`group_offload` needs gradient checkpointing"),
        ({"zero": 2, "mixed_precision": "no"}, "DeepSpeed is planned for in bf16 only"),
        ({"zero": 2, "both_experts": True}, "`both_experts` goes without DeepSpeed, got `zero`=2"),
        ({"rank": 0}, "rank"),
    ],
)
def test_a_run_that_there_is_not(options, told):
    with pytest.raises(ValueError, match=told):
        Training(num_frames=81, height=480, width=832, **options)
