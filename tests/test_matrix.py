"""What diffusers offers beside a pipeline, over films of three clips by every kind of model: the same films.

What is exact gives the film without it, bit for bit; for the rest each test says how far off it may be, and why.
Caches are in test_caches.py, quantized bases in test_quantized.py, several processes in test_parallel.py.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers.models import attention_dispatch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import KINDS
from diffusers_svi import ClipSpec, PixelMotion, SVIPipeline
from diffusers_svi.lora_layers import experts_of
from test_caches import SCHEMES, make_pipe, stream
from test_lora import make_lora


START = PIL.Image.open(Path(__file__).parents[1] / "docs" / "images" / "start.png").convert("RGB").resize((32, 32))


def clips(pipe: SVIPipeline, kind: str, **options) -> Iterator[torch.Tensor]:
    """The latents of three clips with the scheme of `kind`, in two steps with guidance."""
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0} | options
    return (clip.frames for clip in stream(pipe, START, kind, **settings))


def film(pipe: SVIPipeline, kind: str, **options) -> torch.Tensor:
    return torch.stack(list(clips(pipe, kind, **options)))


@cache
def plain(kind: str) -> torch.Tensor:
    return film(make_pipe(kind), kind)


def models(pipe: SVIPipeline) -> list[torch.nn.Module]:
    return [model for model in pipe.components.values() if isinstance(model, torch.nn.Module)]


@pytest.fixture
def graphs() -> Iterator[dict[str, int]]:
    """How many were compiled: `graphs["unique_graphs"]`."""
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


# Attention backends


class Operations(TorchDispatchMode):
    """The names of what torch computes while this is open."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.names.add(str(operation))
        return operation(*arguments, **(options or {}))


def attend(pipe: SVIPipeline, backend: str) -> None:
    # diffusers makes it that of all models; here it is taken back.
    with attention_dispatch.attention_backend("native"):
        for transformer in experts_of(pipe).values():
            transformer.set_attention_backend(backend)


@pytest.mark.parametrize(
    ("backend", "kind", "computed_by"),
    [
        ("native", "a14b", "aten._scaled_dot_product_flash_attention_for_cpu.default"),
        ("_native_math", "a14b", "aten._safe_softmax.default"),
        ("_native_math", "wan2.1", "aten._safe_softmax.default"),  # attends to an image too
    ],
)
def test_attention_is_computed_as_asked_for(backend, kind, computed_by):
    """Another order of sums is off by 1e-6, where values are around 1."""
    pipe = make_pipe(kind)
    attend(pipe, backend)
    with Operations() as operations:
        made = film(pipe, kind)
    assert computed_by in operations.names
    torch.testing.assert_close(made, plain(kind), atol=1e-4, rtol=0)


def test_flex_attention(graphs):
    """It is compiled, unlike the others."""
    pipe = make_pipe("a14b")
    attend(pipe, "flex")
    torch.testing.assert_close(film(pipe, "a14b"), plain("a14b"), atol=1e-4, rtol=0)
    assert graphs["unique_graphs"] > 0


@pytest.mark.parametrize(
    ("backend", "message"), [("quick", "must be one of .*native"), ("flash", "install `flash-attn")]
)
def test_a_backend_that_is_not_there_is_refused_by_diffusers(backend, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        attend(make_pipe("i2v"), backend)


# torch.compile: what is compiled is the same for all clips. The graphs are run by torch as they were traced, not by
# inductor's kernels: films are equal bit for bit, and no compiler of C++ is needed.

EAGER = {"backend": "eager", "fullgraph": True}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_are_compiled_once(kind, graphs):
    """All blocks, of both experts too, share one graph."""
    pipe = make_pipe(kind)
    for transformer in experts_of(pipe).values():
        transformer.compile_repeated_blocks(**EAGER)
    compiled = []
    for made, expected in zip(clips(pipe, kind), plain(kind), strict=True):
        assert torch.equal(made, expected)
        compiled.append(graphs["unique_graphs"])
    assert compiled == [1, 1, 1]


def test_a_compiled_transformer_is_compiled_once(graphs):
    """Wrapped, or in place, as the second one is: they share a graph."""
    pipe = make_pipe("a14b")
    pipe.transformer = torch.compile(pipe.transformer, **EAGER)
    pipe.transformer_2.compile(**EAGER)
    compiled = []
    for made, expected in zip(clips(pipe, "a14b"), plain("a14b"), strict=True):
        assert torch.equal(made, expected)
        compiled.append(graphs["unique_graphs"])
    assert compiled == [1, 1, 1]


def test_dynamic_blocks_are_compiled_once_for_films_of_all_sizes(graphs):
    """As diffusers' documentation has it: sizes that happen to be equal once count as different ones."""
    pipe, wide = make_pipe("a14b"), {"height": 32, "width": 64, "num_frames": 13, "resize_mode": "crop"}
    for transformer in experts_of(pipe).values():
        transformer.compile_repeated_blocks(dynamic=True, **EAGER)
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        assert torch.equal(film(pipe, "a14b"), plain("a14b"))
        assert graphs["unique_graphs"] == 1
        with torch.compiler.set_stance("fail_on_recompile"):
            made = film(pipe, "a14b", **wide)
    assert torch.equal(made, film(make_pipe("a14b"), "a14b", **wide))


def test_compiled_blocks_with_a_cache_are_compiled_in_the_first_two_clips(graphs):
    """Not as one graph: the cache decides between them, and in the second clip it has been at work before."""
    pipe, options = make_pipe("ti2v-5b", "FirstBlock"), {"guidance_scale": 1.0, "num_inference_steps": 3}
    pipe.transformer.compile_repeated_blocks(backend="eager")
    compiled, expected = [], film(make_pipe("ti2v-5b", "FirstBlock"), "ti2v-5b", **options)
    for made, other in zip(clips(pipe, "ti2v-5b", **options), expected, strict=True):
        assert torch.equal(made, other)
        compiled.append(graphs["unique_graphs"])
    assert 1 < compiled[0] <= compiled[1] == compiled[2]


def test_a_compiled_vae_is_compiled_once(graphs):
    pipe, options = make_pipe("i2v"), {"num_frames": 5, "conditioning": PixelMotion(1)}
    expected = film(pipe, "i2v", **options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")
    compiled = []
    for made, before in zip(clips(pipe, "i2v", **options), expected, strict=True):
        assert torch.equal(made, before)
        compiled.append(graphs["unique_graphs"])
    assert compiled == [1, 1, 1]


# Offloading, with the CPU on both sides: the hooks run as they do on a GPU.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(offload_type, kind):
    pipe, cpu = make_pipe(kind), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(cpu, cpu, offload_type=offload_type, **blocks)
    hooked = [module for module in pipe.transformer.modules() if hasattr(module, "_diffusers_hook")]
    assert len(hooked) > len(pipe.transformer.blocks)
    assert torch.equal(film(pipe, kind), plain(kind))


@pytest.mark.parametrize("kind", ["wan2.1", "a14b"])
def test_model_offload(kind):
    pipe = make_pipe(kind)
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe._all_hooks) == len(models(pipe))
    assert torch.equal(film(pipe, kind), plain(kind))


@pytest.mark.parametrize("kind", ["wan2.1", "a14b"])
def test_sequential_offload(kind):
    """As `enable_sequential_cpu_offload` does for each model; it would have them run on "cpu:0", which is none."""
    pipe = make_pipe(kind)
    for model in models(pipe):
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    assert torch.equal(film(pipe, kind), plain(kind))
    assert {weight.device.type for model in models(pipe) for weight in model.parameters()} == {"meta"}


# Weights in float8


@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting(kind):
    """Float8 has three bits for digits: weights are off by up to 6%, and films by less than that of their spread."""
    pipe = make_pipe(kind)
    for transformer in experts_of(pipe).values():
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    made, expected = film(pipe, kind), plain(kind)
    assert {
        layer.weight.dtype for layer in (pipe.transformer.blocks[0].attn1.to_q, pipe.transformer.blocks[1].ffn.net[2])
    } == {torch.float8_e4m3fn}
    assert 0 < (made - expected).abs().mean() < 0.0625 * expected.std()


# LoRAs that are changed while films are made


def with_lora(lora: dict, pipe: SVIPipeline | None = None) -> SVIPipeline:
    pipe = make_pipe("ti2v-5b") if pipe is None else pipe
    pipe.load_lora_weights(lora, adapter_name="svi", conditioning=SCHEMES["ti2v-5b"])
    return pipe


def test_loras_are_swapped_between_clips_and_nothing_is_compiled_again(graphs):
    """One of rank 8 in the place of one of rank 4."""
    pipe = make_pipe("ti2v-5b")
    small, large = make_lora(pipe.transformer), make_lora(pipe.transformer, seed=1, rank=8)
    pipe.enable_lora_hotswap(target_rank=8)
    with_lora(small, pipe).transformer.compile_repeated_blocks(**EAGER)
    made = []
    for latents in clips(pipe, "ti2v-5b"):
        made.append(latents)
        if len(made) == 1:
            pipe.load_lora_weights(large, adapter_name="svi", hotswap=True, conditioning=SCHEMES["ti2v-5b"])
    assert graphs["unique_graphs"] == 1
    first = next(stream(with_lora(small), START, "ti2v-5b", num_inference_steps=2, guidance_scale=2.0))
    rest = stream(
        with_lora(large), state=first.state, ignore_state_settings=True, num_inference_steps=2, guidance_scale=2.0
    )
    expected = [first.frames, *(clip.frames for clip in rest)]
    assert all(torch.equal(latents, other) for latents, other in zip(made, expected, strict=True))


def test_weights_of_loras_of_single_clips_are_compiled_once_more(graphs):
    """The first other weight makes it a variable."""
    pipe = with_lora(make_lora(make_pipe("ti2v-5b").transformer))
    pipe.transformer.compile_repeated_blocks(**EAGER)
    prompts = ["a cat sits", *(ClipSpec("the dog jumps", lora_weights={"svi": weight}) for weight in (0.5, 0.25))]
    compiled = []
    expected = film(with_lora(make_lora(make_pipe("ti2v-5b").transformer)), "ti2v-5b", prompts=prompts)
    for made, other in zip(clips(pipe, "ti2v-5b", prompts=prompts), expected, strict=True):
        assert torch.equal(made, other)
        compiled.append(graphs["unique_graphs"])
    assert compiled == [1, 2, 2]
