"""SVI and few-step LoRAs on both experts of an A14B whose weights are packed, over films of three clips."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig, QuantoConfig, TorchAoConfig, WanTransformer3DModel
from safetensors.torch import save_file

from conftest import TEXT_DIM, make_components
from diffusers_svi import LatentMotion, SVIPipeline
from diffusers_svi.fingerprints import fingerprint_loras, fingerprint_weights
from diffusers_svi.lora_layers import experts_of
from test_lora import make_lora
from test_matrix import film


EXPERTS = ("transformer", "transformer_2")
# Rows of 64 and 128 values: GGUF packs 32 at a time, bitsandbytes 64.
SIZE = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "freq_dim": 64, "num_layers": 2}
# From diffusers' names to those of the original code, which GGUF files have.
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two experts, and their LoRAs: as people have them, an SVI LoRA and a few-step one of other keys."""
    folder = tmp_path_factory.mktemp("a14b")
    for seed, expert in enumerate(EXPERTS):
        model = make_expert(seed)
        model.save_pretrained(folder / expert)
        write_gguf(model, folder / f"{expert}.gguf")
        noise = ("high_noise", "low_noise")[seed]
        save_file(make_lora(model, seed=seed), folder / f"svi_{noise}.safetensors")
        save_file(make_lora(model, seed=2 + seed, layout="kohya", alpha=2), folder / f"fast_{noise}.safetensors")
    return folder


def make_expert(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(in_channels=36, out_channels=16, text_dim=TEXT_DIM, rope_max_seq_len=64, **SIZE)


def write_gguf(model: WanTransformer3DModel, path: Path) -> None:
    """As published files: linear layers of the blocks in Q8_0, the rest in float32, under the original names."""
    writer, q8_0 = gguf.GGUFWriter(path, "wan"), gguf.GGMLQuantizationType.Q8_0
    for key, value in model.state_dict().items():
        name = "head.modulation" if key == "scale_shift_table" else key
        for ours, original in ORIGINAL.items():
            name = name.replace(ours, original)
        weight = value.numpy()
        if key.startswith("blocks.") and value.ndim == 2 and key.endswith(".weight"):
            writer.add_tensor(name, gguf.quants.quantize(weight, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_gguf(folder: Path, expert: str) -> WanTransformer3DModel:
    compute = GGUFQuantizationConfig(compute_dtype=torch.float32)
    options = {"config": str(folder), "subfolder": expert, "torch_dtype": torch.float32}
    return WanTransformer3DModel.from_single_file(
        str(folder / f"{expert}.gguf"), quantization_config=compute, **options
    )


def plain(folder: Path, expert: str, **options) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(folder / expert, torch_dtype=torch.float32, **options).eval()


def torchao(folder: Path, expert: str) -> WanTransformer3DModel:
    from torchao.quantization import Int8WeightOnlyConfig

    return plain(folder, expert, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def quanto(folder: Path, expert: str) -> WanTransformer3DModel:
    return plain(folder, expert, quantization_config=QuantoConfig(weights_dtype="int8"))


def in_place(make: Callable[[torch.nn.Linear], torch.nn.Linear]) -> Callable[[Path, str], WanTransformer3DModel]:
    """diffusers loads by bitsandbytes on a GPU only: the layers that it would make."""

    def load(folder: Path, expert: str) -> WanTransformer3DModel:
        model = plain(folder, expert)
        for name, layer in list(model.named_modules()):
            if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, make(layer))
        return model

    return load


@in_place
def bitsandbytes_4(layer: torch.nn.Linear) -> torch.nn.Linear:
    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    new.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.bias = layer.bias
    return new.to("cpu")


@in_place
def bitsandbytes_8(layer: torch.nn.Linear) -> torch.nn.Linear:
    new = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    new.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


def unpacked(packed: WanTransformer3DModel, folder: Path, expert: str) -> WanTransformer3DModel:
    """The model in float32 whose weights are those that the packed layers compute with."""
    model = plain(folder, expert)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            of_packed, ones = packed.get_submodule(name), torch.eye(layer.in_features)
            with torch.no_grad():
                layer.weight.copy_((of_packed(ones) - of_packed(0 * ones)).T)
    return model


def with_loras(folder: Path, load: Callable[[Path, str], WanTransformer3DModel]) -> SVIPipeline:
    """The weights that the authors advise: half of the few-step LoRA in the high-noise expert."""
    pipe = SVIPipeline(**make_components("a14b") | {expert: load(folder, expert) for expert in EXPERTS})
    pipe.set_progress_bar_config(disable=True)
    for name, scheme in (("svi", LatentMotion(1)), ("fast", None)):
        files = {"weight_name": f"{name}_high_noise.safetensors", "weight_name_2": f"{name}_low_noise.safetensors"}
        pipe.load_lora_weights(folder, adapter_name=name, conditioning=scheme, **files)
    pipe.transformer.set_adapters(["svi", "fast"], [1.0, 0.5])
    pipe.transformer_2.set_adapters(["svi", "fast"], [1.0, 1.0])
    return pipe


BASES = {
    "GGUF": (from_gguf, "GGUFParameter"),
    "torchao": (torchao, "Int8Tensor"),
    "quanto": (quanto, "WeightQBytesTensor"),
    "bitsandbytes 4 bits": (bitsandbytes_4, "Params4bit"),
    "bitsandbytes 8 bits": (bitsandbytes_8, "Int8Params"),
}


@pytest.fixture(scope="module")
def full(folder) -> torch.Tensor:
    return film(with_loras(folder, plain), "a14b", guidance_scale=1.0)


@pytest.mark.parametrize("base", BASES)
def test_loras_on_a_packed_base(base, folder, full):
    """The film is that of the weights that the packed layers have, with the same LoRAs, which are not packed.

    Off by 1e-6, where values are around 1: sums in another order. Weights of 4 bits are off by a fourteenth of the
    largest at most, as far as that between them, and those of 8 bits by less; LoRAs change the film by 0.3.
    """
    load, kind = BASES[base]
    pipe = with_loras(folder, load)
    assert type(pipe.transformer_2.blocks[0].attn1.to_q.base_layer.weight).__name__ == kind
    made = film(pipe, "a14b", guidance_scale=1.0)
    by_hand = with_loras(folder, lambda folder, expert: unpacked(load(folder, expert), folder, expert))
    torch.testing.assert_close(made, film(by_hand, "a14b", guidance_scale=1.0), atol=1e-4, rtol=0)
    assert 0 < (made - full).abs().mean() < 0.05


def test_loras_on_layers_kept_in_float8(folder, full):
    """LoRAs first: they stay as they are."""
    pipe = with_loras(folder, plain)
    for transformer in experts_of(pipe).values():
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert (layer.base_layer.weight.dtype, layer.lora_A["svi"].weight.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert 0 < (film(pipe, "a14b", guidance_scale=1.0) - full).abs().mean() < 0.05


def test_loras_come_before_float8(folder):
    """Afterwards peft would make their weights float8 too, with which nothing can be computed."""

    def float8(folder: Path, expert: str) -> WanTransformer3DModel:
        model = plain(folder, expert)
        model.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
        return model

    with pytest.raises(ValueError, match="`transformer` are kept in torch.float8_e4m3fn.*`enable_layerwise_casting`"):
        with_loras(folder, float8)
    # One that is there already is of the type that it had, and so is what takes its place.
    pipe = with_loras(folder, plain)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    pipe.load_lora_weights(folder, weight_name="fast_high_noise.safetensors", adapter_name="fast", hotswap=True)


@pytest.mark.parametrize("base", BASES)
def test_a_state_knows_a_packed_base(base, folder):
    """Loaded again it is the same, and another than the full one."""
    load, _ = BASES[base]
    told = {fingerprint_weights(load(folder, "transformer")) for _ in range(2)}
    assert len(told) == 1 and fingerprint_weights(plain(folder, "transformer")) not in told


def test_a_swapped_lora_is_known_by_its_values(folder):
    """Where LoRAs are to be swapped, diffusers makes their scales tensors, one a layer."""
    told = []
    for swapped in (False, True):
        pipe = SVIPipeline(**make_components("a14b") | {expert: plain(folder, expert) for expert in EXPERTS})
        if swapped:
            pipe.enable_lora_hotswap(target_rank=4)
        pipe.load_lora_weights(folder, weight_name="svi_high_noise.safetensors", adapter_name="svi")
        if swapped:
            pipe.load_lora_weights(folder, weight_name="svi_high_noise.safetensors", adapter_name="svi", hotswap=True)
            assert isinstance(pipe.transformer.blocks[0].attn1.to_q.scaling["svi"], torch.Tensor)
        told.append(fingerprint_loras(pipe.transformer))
    assert told[0] == told[1] and told[0].endswith(" of scale 1")
