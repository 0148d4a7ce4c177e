r"""Measure what a clip and a training step take of a machine's memory, against what the plan computes for them.

    python benchmarks/memory.py --json --output_dir docs/results/memory

Small models on the CPU, in float32, at several sizes: a clip by `SVIPipeline`, text, encoding, denoising and decoding,
and a step of error recycling with gradient checkpointing, as in `erft_step.py`. Each is made in a process of its own;
measured is the most that it has been resident, less what was resident before models were made. The plan's figure is
that of `inference_memory` with everything on one device, or `training_memory` with the bank.

The CPU has torch's fused attention, as GPUs have. Below about 100 pixels a side its convolutions are `slow_conv3d`,
which writes out all windows, 27 times the input: a clip of 96 pixels is there to show that. Other sizes have
`mkldnn_convolution`, which takes next to nothing beside its input and output.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import psutil
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from erft_step import Trainer, build_recycler
from report import provenance, write_json
from transformers import UMT5EncoderModel

from diffusers_svi import SVIPipeline
from diffusers_svi.erft import BankConfig
from diffusers_svi.memory import Clip, Training, inference_memory, training_memory
from diffusers_svi.memory.model import shapes_of
from diffusers_svi.training.step_times import peak_resident_bytes


MODEL = Path(__file__).parents[1] / "examples" / "svi_tiny" / "model"
NUM_FRAMES = 9
HEADS, INNER, LAYERS, RANK = 4, 1536, 4, 32
# Heights and widths of the clips, and the latents of the steps.
SIZES = {"clip": (96, 128, 160, 192), "step": ((16, 3, 32, 32), (16, 5, 32, 32), (16, 3, 64, 64))}
QUICK = {"clip": (64,), "step": ((16, 3, 16, 16),)}


def measure_clip(side: int) -> dict[str, float]:
    text = UMT5EncoderModel.from_pretrained(MODEL, subfolder="text_encoder")
    # What libraries load when they are first used is there before.
    _clip(SVIPipeline.from_pretrained(MODEL), 32)
    before = psutil.Process().memory_info().rss
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=128,
        in_channels=36,
        out_channels=16,
        text_dim=text.config.d_model,
        ffn_dim=INNER,
        num_layers=LAYERS,
    )
    vae = AutoencoderKLWan(base_dim=32)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text}
    _clip(SVIPipeline.from_pretrained(MODEL, **parts), side)
    size = (NUM_FRAMES, side, side)
    clip = Clip(num_frames=NUM_FRAMES, height=side, width=side, dtype=torch.float32, lora_rank=0)
    plan = inference_memory(shapes_of("small", parts, False, size), clip)
    return {**_compared(before, plan.gpu_bytes), "at_the_peak": plan.peak.name}


def _clip(pipe: SVIPipeline, side: int) -> None:
    pipe.set_progress_bar_config(disable=True)
    picture = PIL.Image.fromarray(np.full((side, side, 3), 90, np.uint8))
    options = {"height": side, "width": side, "num_frames": NUM_FRAMES, "num_inference_steps": 1}
    pipe(image=picture, prompts="a red ball", guidance_scale=1, generator=torch.Generator().manual_seed(0), **options)


def measure_step(*latent_shape: int) -> dict[str, float]:
    args = SimpleNamespace(
        latent_shape=list(latent_shape),
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=INNER,
        text_dim=64,
        rank=RANK,
        num_grids=5,
        capacity=4,
        dtype="float32",
        bank_dtype="bfloat16",
        device="cpu",
        seed=0,
    )
    small = SimpleNamespace(**{**vars(args), "latent_shape": [16, 1, 4, 4], "num_layers": 1, "num_attention_heads": 1})
    Trainer(small).step(build_recycler(small))
    before = psutil.Process().memory_info().rss
    trainer, recycler = Trainer(args), build_recycler(args)
    trainer.step(recycler)
    _, frames, rows, columns = latent_shape
    size = (1 + 4 * (frames - 1), 8 * rows, 8 * columns)
    parts = {
        "transformer": trainer.transformer,
        "vae": _meta_vae(),
        "text_encoder": UMT5EncoderModel.from_pretrained(MODEL, subfolder="text_encoder"),
    }
    training = Training(
        num_frames=size[0],
        height=size[1],
        width=size[2],
        rank=RANK,
        mixed_precision="no",
        is_cached=True,
        bank=BankConfig(num_grids=5, capacity=4),
    )
    # Counted without the LoRA, which is planned for apart.
    trainer.transformer.delete_adapters("default")
    plan = training_memory(shapes_of("small", parts, False, size), training)
    return {**_compared(before, plan.gpu_bytes + plan.host["error bank"]), "at_the_peak": plan.peak.name}


def _meta_vae() -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan()


def _compared(before: int, planned: int) -> dict[str, float]:
    measured = peak_resident_bytes() - before
    return {"measured_bytes": measured, "planned_bytes": planned, "planned_over_measured": planned / measured}


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4))
    for kind, runs in results["runs"].items():
        measured, planned = ([run[f"{name}_bytes"] / 1e6 for run in runs] for name in ("measured", "planned"))
        axes.plot(measured, planned, "o-", label=kind)
    most = max(run["measured_bytes"] for runs in results["runs"].values() for run in runs) / 1e6
    axes.plot([0, most], [0, most], color="grey", linewidth=0.8, label="equal")
    axes.set(xlabel="measured, MB", ylabel="planned, MB", title="Peak memory on the CPU")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="For a test: one small size of each.")
    parser.add_argument("--json", action="store_true", help="Print all figures as one line of JSON, the last one.")
    parser.add_argument("--output_dir", type=Path, help="Write figures and plot here.")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        kind, *size = args.measure
        print(json.dumps({"clip": measure_clip, "step": measure_step}[kind](*map(int, size))))
        return
    results = {**provenance(), "runs": {}}
    for kind, sizes in (QUICK if args.quick else SIZES).items():
        results["runs"][kind] = []
        for size in sizes:
            given = [str(length) for length in (size if isinstance(size, tuple) else (size,))]
            command = [sys.executable, __file__, "--measure", kind, *given]
            # Large blocks go back to the machine when they are freed, as they do to a GPU's allocator.
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            results["runs"][kind].append({"size": size, **json.loads(told.splitlines()[-1])})
    if args.output_dir is not None:
        write_json(results, args.output_dir / "memory.json")
        plot(results, args.output_dir / "memory.png")
    print(json.dumps(results) if args.json else json.dumps(results["runs"], indent=1))


if __name__ == "__main__":
    main()
