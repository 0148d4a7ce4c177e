"""What `plan` tells of memory, as tables."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ..presets import PRESETS, QUANTIZATIONS, Preset


if TYPE_CHECKING:
    from ..memory import Clip, ModelShapes, Plan


FORMS_TRIED = ("fp8", "Q8_0", "Q4_K")
_NOTE = (
    "Computed from shapes; of 14B on one card a clip took 2% more, a training step 9% less. A card fits if 1.5 GB are "
    "left beside the peak. GB are 1e9 bytes, cards are in GiB."
)


def of_clips(model: "ModelShapes", options: Mapping[str, Any], family: Preset) -> None:
    """Tell what the clips of a film need, in every way of offloading."""
    import torch

    from ..memory import CARDS, Clip, inference_memory
    from ..memory.inference import OFFLOADS, what_fits

    if options["gguf"] is not None and options["quantize"] != "none":
        raise click.UsageError("Give one of `--gguf` and `--quantize`.")
    frames, height, width = _clip_size(model, options, family.num_frames)
    dtype = options["dtype"] or "bfloat16"
    clip = Clip(
        num_frames=frames,
        height=height,
        width=width,
        dtype=getattr(torch, dtype),
        form=options["gguf"] or options["quantize"],
        vae_tiling=options["vae_tiling"],
        lora_rank=options["rank"] if family.has_lora(options["lora"]) else 0,
        attention=options["attention"],
    )
    cards = options["card"] or CARDS
    kept = "" if clip.form == "none" else f", transformers in {clip.form}"
    lora = f", LoRA of rank {clip.lora_rank}" if clip.lora_rank else ""
    tiles = ", tiled VAE" if clip.vae_tiling else ""
    click.echo(f"model    {model.name}: {_listed(model.num_bytes(clip.dtype))} of weights in {dtype}, VAE in float32")
    click.echo(
        f"memory   GB on the GPU, {frames} frames of {height} x {width}, "
        f"{model.num_tokens(frames, height, width)} tokens{kept}{lora}{tiles}"
    )
    plans = {offload: inference_memory(model, replace(clip, offload=offload)) for offload in OFFLOADS}
    _table("--offload", plans, cards)
    chosen = options["offload"]
    click.echo(f"at the peak with --offload {chosen}: {_told(plans[chosen])}")
    for card in cards:
        way = what_fits(model, clip, card, FORMS_TRIED)
        click.echo(f"{card:g} GB: {'nothing here fits' if way is None else _way(way)}")
    click.echo(_NOTE)


def of_training(model: "ModelShapes", options: Mapping[str, Any]) -> None:
    """Tell what a training run needs."""
    from ..erft import BankConfig
    from ..memory import CARDS, Training, training_memory

    (frames, height, width), *more = _bucket_sizes(model, options)
    training = Training(
        num_frames=frames,
        height=height,
        width=width,
        more_buckets=tuple(more),
        both_experts=options["both_experts"],
        rank=options["rank"],
        batch_size=options["train_batch_size"],
        mixed_precision="no" if options["dtype"] == "float32" else "bf16",
        zero=int(options["zero"]),
        num_processes=options["processes"],
        gradient_checkpointing=not options["no_checkpointing"],
        quantize_base=options["quantize_base"] or "none",
        group_offload=options["group_offload"],
        is_cached=options["cached"],
        bank=BankConfig(dtype=options["bank_dtype"], capacity=options["bank_capacity"]),
    )
    cards = options["card"] or CARDS
    click.echo(f"model    {model.name}, LoRA of rank {training.rank}, {training.num_processes} processes")
    told = ", ".join(f"{frames} frames of {height} x {width}" for frames, height, width in training.sizes)
    click.echo(f"memory   GB on each GPU, {told}, batch of {training.batch_size}")
    has_zero = training.mixed_precision == "bf16" and not training.both_experts
    whole = replace(training, quantize_base="none", group_offload=False)
    quantized = replace(whole, zero=min(training.zero, 2))
    ways = {
        "as asked": training,
        "no checkpointing": replace(training, gradient_checkpointing=False, group_offload=False),
        "ZeRO-2": replace(whole, zero=2) if has_zero else None,
        "ZeRO-3": replace(whole, zero=3) if has_zero else None,
        "blocks on the CPU": replace(whole, zero=0, gradient_checkpointing=True, group_offload=True),
        "8-bit base": replace(quantized, quantize_base="8bit"),
        "4-bit base": replace(quantized, quantize_base="4bit"),
        "4-bit, cached": replace(quantized, quantize_base="4bit", is_cached=True),
    }
    plans = {name: training_memory(model, way) for name, way in ways.items() if way is not None}
    _table("run", plans, cards)
    asked = plans["as asked"]
    click.echo(f"at the peak as asked: {_told(asked)}")
    click.echo(f"in the machine: {_listed(asked.host)}")
    for card in cards:
        fitting = next((name for name, plan in plans.items() if plan.fits(card)), None)
        click.echo(f"{card:g} GB: {fitting or 'nothing here fits'}")
    click.echo(_NOTE)


def readable_size(size: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _clip_size(model: "ModelShapes", options: Mapping[str, Any], num_frames: int) -> tuple[int, int, int]:
    from .order import check_settings

    frames = options["num_frames"] or num_frames
    height, width = options["height"] or model.size[1], options["width"] or model.size[2]
    size = {"num_frames": frames, "height": height, "width": width}
    check_settings({**size, "num_inference_steps": 1, "guidance_scale": 1.0})
    for name in ("height", "width"):
        if size[name] % model.step:
            raise ValueError(f"`--{name}` must be a multiple of {model.step} for {model.name}, got {size[name]}.")
    return frames, height, width


def _bucket_sizes(model: "ModelShapes", options: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Of the clips that are trained on, each `(num_frames, height, width)`."""
    from ..training.buckets import read_buckets
    from ..training.ranges import check_buckets

    num_frames = PRESETS[options["preset"]].num_frames
    if options["buckets"] is None:
        return [_clip_size(model, options, num_frames)]
    buckets = options["buckets"].split()
    check_buckets({**options, "buckets": buckets})
    sizes = []
    for bucket in read_buckets(buckets, options["num_frames"] or num_frames):
        width, height, frames = map(int, bucket.split("x"))
        if width % model.step or height % model.step:
            raise ValueError(f"`--buckets`: width and height must be multiples of {model.step}, got {bucket}.")
        sizes.append((frames, height, width))
    return sizes


def _table(first: str, plans: "Mapping[str, Plan]", cards: Iterable[float]) -> None:
    names = list(dict.fromkeys(phase.name for plan in plans.values() for phase in plan.phases))
    head = [first, *names, "peak", "host", *(f"{card:g} GB" for card in cards)]
    rows = [head]
    for name, plan in plans.items():
        phases = {phase.name: f"{phase.num_bytes / 1e9:.1f}" for phase in plan.phases}
        fits = ("yes" if plan.fits(card) else "no" for card in cards)
        totals = (f"{plan.gpu_bytes / 1e9:.1f}", f"{plan.host_bytes / 1e9:.1f}")
        rows.append([name, *(phases.get(phase, "-") for phase in names), *totals, *fits])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for name, *values in rows:
        cells = (value.rjust(wide) for value, wide in zip(values, widths[1:], strict=True))
        click.echo(f"  {name.ljust(widths[0])}  {'  '.join(cells)}")


def _told(plan: "Plan") -> str:
    return f"{plan.peak.name}, {_listed(plan.peak.parts)}"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {readable_size(size)}" for name, size in sizes.items())


def _way(clip: "Clip") -> str:
    name = "--quantize" if clip.form in QUANTIZATIONS else "--gguf"
    form = "" if clip.form == "none" else f" {name} {clip.form}"
    offload = clip.offload.removesuffix("+streams")
    return f"--offload {offload}{' --vae_tiling' if clip.vae_tiling else ''}{form}"
