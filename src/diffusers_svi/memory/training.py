"""What a run of `examples/train_erft.py` needs: encoding, which a full cache leaves out, loading, and steps."""

import math
from dataclasses import dataclass, field

import torch

from ..checks import check_choice, check_count
from ..erft import BankConfig
from ..erft.bank import reached_grids
from ..flow import shifted_sigmas
from ..lora_layers import EXPERTS
from ..presets import Preset
from ..training.quantized import QUANTIZATIONS
from ..wan import MAX_TOKENS
from .activations import FLOAT, encode_peak, image_peak, text_peak, training_peak
from .inference import tokens_of
from .model import ModelShapes
from .phases import Phase, Plan


# source: DeepSpeed's defaults, in values: `reduce_bucket_size`, and `stage3_max_live_parameters`
REDUCE_BUCKET, MAX_LIVE = int(5e8), int(1e9)
# source: the trainer's noise levels; its `--flow_shift`, if none is given, is that of the presets
TIMESTEPS, SHIFT = 1000, Preset.shift
QUANTIZED_BASES = ("none", *QUANTIZATIONS)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a LoRA is trained, as far as memory depends on it.

    Args:
        num_frames, height, width (`int`): Of a clip.
        more_buckets (`tuple`, *optional*): Sizes of other clips, each `(num_frames, height, width)`.
        both_experts (`bool`, defaults to `False`): Train both experts in turns, the idle one on the CPU.
        rank (`int`, defaults to 128): Of the LoRA.
        batch_size (`int`, defaults to 1): Samples a step and process.
        mixed_precision (`str`, defaults to `"bf16"`): Or "no": all in float32.
        zero (`int`, defaults to 0): DeepSpeed's stage, 2 or 3; 0 without DeepSpeed.
        num_processes (`int`, defaults to 1): One a GPU, on one machine.
        gradient_checkpointing (`bool`, defaults to `True`): Keep the inputs of blocks only, and compute them again.
        quantize_base (`str`, defaults to `"none"`): What the frozen base is kept in, one of `QUANTIZED_BASES`.
        group_offload (`bool`, defaults to `False`): Keep its blocks on the CPU, but two.
        is_cached (`bool`, defaults to `False`): Whether the cache has all samples already: no encoder is loaded.
        bank (`BankConfig`): Of the error bank of each process.

    Raises:
        ValueError: for a value that there is not.
    """

    num_frames: int
    height: int
    width: int
    more_buckets: tuple[tuple[int, int, int], ...] = ()
    both_experts: bool = False
    rank: int = 128
    batch_size: int = 1
    mixed_precision: str = "bf16"
    zero: int = 0
    num_processes: int = 1
    gradient_checkpointing: bool = True
    quantize_base: str = "none"
    group_offload: bool = False
    is_cached: bool = False
    bank: BankConfig = field(default_factory=BankConfig)

    def __post_init__(self) -> None:
        check_choice("mixed_precision", self.mixed_precision, ("bf16", "no"))
        if self.zero not in (0, 2, 3):
            raise ValueError(f"`zero` must be 2 or 3, a stage of DeepSpeed, or 0 for none, got {self.zero!r}.")
        check_choice("quantize_base", self.quantize_base, QUANTIZED_BASES)
        for name in ("rank", "batch_size", "num_processes"):
            check_count(name, getattr(self, name), 1)
        if self.zero and self.mixed_precision == "no":
            raise ValueError("`zero`: DeepSpeed is planned for in bf16 only. Leave out `mixed_precision`='no'.")
        if self.zero == 3 and self.quantize_base != "none":
            raise ValueError(
                f"`quantize_base`={self.quantize_base!r} with `zero`=3: quantized weights cannot be dealt out. Use 2."
            )
        if self.zero and self.quantize_base in ("int8", "fp8"):
            raise ValueError(f"`quantize_base`={self.quantize_base!r} goes without DeepSpeed, got `zero`={self.zero}.")
        if self.group_offload and (self.zero or self.quantize_base != "none" or not self.gradient_checkpointing):
            raise ValueError(
                "`group_offload` needs gradient checkpointing, and goes neither with DeepSpeed nor a quantized base."
            )
        if self.both_experts and self.zero:
            raise ValueError(f"`both_experts` goes without DeepSpeed, got `zero`={self.zero}. Plan for one of them.")

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """Of the clips of every bucket, each `(num_frames, height, width)`."""
        return ((self.num_frames, self.height, self.width), *self.more_buckets)


def training_memory(model: ModelShapes, training: Training) -> Plan:
    r"""What a run needs, on each GPU, and in the machine for all processes.

    With P weights in the LoRA and n processes, AdamW takes

    - without DeepSpeed `16 P`: weights, gradients and two averages in float32; `4 P` more for the buckets in which
      gradients are exchanged, with more than one process;
    - with ZeRO-2 `2 P + 2 P / n + 12 P / n`: weights and gradients in bfloat16, and in float32 weights and two
      averages; and a bucket of `REDUCE_BUCKET` values;
    - with ZeRO-3 `16 P / n`, the base dealt out too, and `MAX_LIVE` weights at most put together at a time.

    In the machine's memory every process has a bank for each bucket and expert, of the grids that the expert reaches
    (of one expert: of that which reaches more), and loads the base. There lie base, LoRA and averages of the expert
    whose turn it is not; but its LoRA stays on the GPU with a quantized base, and with what is outside of the blocks
    where these are on the CPU.

    Raises:
        ValueError: for two experts of a model that has one.
    """
    if training.both_experts and not all(name in model.weights for name in EXPERTS):
        raise ValueError(f"`both_experts`: {model.name} has one transformer only. Leave it out.")
    dtype = torch.bfloat16 if training.mixed_precision == "bf16" else torch.float32
    weights = next(model.weights[name] for name in EXPERTS if name in model.weights)
    lora, n = weights.lora_count(training.rank), training.num_processes
    base = weights.num_bytes(dtype, training.quantize_base)
    outside_blocks = base - weights.in_blocks * dtype.itemsize  # unless it is quantized
    precision = "float32" if dtype == torch.float32 else "half" if training.zero else "autocast"
    layers = model.transformer["num_layers"]
    peaks = [
        training_peak(
            tokens_of(model, *size, dtype.itemsize, training.batch_size),
            layers,
            training.rank,
            precision,
            training.gradient_checkpointing,
        )
        for size in training.sizes
    ]
    parts = {**_states(lora, training), "activations": max(peaks)}
    if training.zero == 3:
        parts["base"], parts["weights put together"] = base // n, 2 * min(MAX_LIVE, weights.count)
    elif training.group_offload:
        parts["base"] = outside_blocks + (base - outside_blocks) * min(2, layers) // layers
    else:
        parts["base"] = base
    if training.quantize_base != "none":
        parts["a layer unpacked"] = weights.largest_linear * dtype.itemsize
    if precision == "autocast":
        parts["LoRA in bfloat16"] = 2 * lora
    shapes = [model.latent_shape(*size) for size in training.sizes]
    parts["latents and prompts"] = 12 * FLOAT * training.batch_size * max(map(math.prod, shapes))
    stays = 0  # on the GPU, of the expert whose turn it is not
    if training.both_experts and (training.group_offload or training.quantize_base != "none"):
        stays = FLOAT * lora + (outside_blocks if training.group_offload else base)
        parts["the other expert"] = stays
    phases = [] if training.is_cached else [_encoding(model, training, dtype)]
    # Only ZeRO-3 changes the LoRA's type before it is on the GPU.
    loaded = parts["LoRA"] if training.zero == 3 else FLOAT * lora
    phases += [Phase("load", {"base": parts["base"], "LoRA": loaded}), Phase("step", parts)]
    num_grids = _num_grids(model, training)
    bank = sum(training.bank.num_bytes(shape, num_grids) for shape in shapes)
    host = {
        "base" if training.group_offload else "base, while it is loaded": n * base,
        "error bank" if n == 1 else f"error banks of {n} processes": 0 if training.bank.path else n * bank,
    }
    if training.both_experts:
        host["the other expert"] = n * (base + 3 * FLOAT * lora - stays)
    return Plan(tuple(phases), host)


def _num_grids(model: ModelShapes, training: Training) -> int:
    """Of the banks of a clip's shape: an expert never meets the grids of the other."""
    if model.boundary is None:
        return training.bank.num_grids
    sigmas, grids = shifted_sigmas(TIMESTEPS, SHIFT), shifted_sigmas(training.bank.num_grids, SHIFT)
    is_high = sigmas >= model.boundary
    of_experts = [len(reached_grids(sigmas[side], grids)) for side in (is_high, ~is_high)]
    return sum(of_experts) if training.both_experts else max(of_experts)


def _states(lora: int, training: Training) -> dict[str, int]:
    n = training.num_processes
    if training.zero == 2:
        return {
            "LoRA": 2 * lora,
            "gradients": 2 * lora // n + 2 * REDUCE_BUCKET,
            "optimizer": 12 * lora // n,
        }
    if training.zero == 3:
        return {"LoRA": 2 * lora // n, "gradients": 2 * lora // n + 2 * REDUCE_BUCKET, "optimizer": 12 * lora // n}
    return {"LoRA": 4 * lora, "gradients": (4 if n == 1 else 8) * lora, "optimizer": 8 * lora}


def _encoding(model: ModelShapes, training: Training, dtype: torch.dtype) -> Phase:
    """All encoders are on the GPU, the image encoder in float32 as the VAE."""
    there = {
        name: model.weights[name].num_bytes(torch.float32 if name != "text_encoder" else dtype)
        for name in ("text_encoder", "image_encoder", "vae")
        if name in model.weights
    }
    peaks = [encode_peak(model.vae, *size) for size in training.sizes]
    peaks.append(text_peak(model.text_encoder, MAX_TOKENS, dtype.itemsize))
    if model.image_encoder is not None:
        peaks.append(image_peak(model.image_encoder, FLOAT))
    return Phase("encode", {**there, "activations": max(peaks)})
