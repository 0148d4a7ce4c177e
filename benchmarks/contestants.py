"""Who takes part in a benchmark of svi-tiny: the base model with a scheme, or with a LoRA that brings its own."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_svi import SVIPipeline
from diffusers_svi.conditioning import Scheme
from diffusers_svi.lora_file import read_lora


# Here for all benchmarks: they import this before anything of `svi_tiny`.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
from svi_tiny import world


# Films of this seed are never trained on.
HELD_OUT_SEED = 1
SVI_TINY = str(Path(world.__file__).parent / "model")
# How svi-tiny makes a clip.
WORLD_OPTIONS = {
    "height": world.SIZE,
    "width": world.SIZE,
    "num_frames": world.CLIP_FRAMES,
    "num_inference_steps": 10,
    "guidance_scale": 1.0,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_contestant_options(parser: argparse.ArgumentParser, plain: dict[str, Scheme]) -> None:
    parser.add_argument("--model_dir", default=SVI_TINY, help="Folder or Hub name. Default: svi-tiny.")
    parser.add_argument("--device", default="cpu", help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of all but the VAE. Default: %(default)s.")
    parser.add_argument("--lora", nargs="*", default=[], metavar="NAME=FILE", help="With the scheme in the metadata.")
    parser.add_argument(
        "--contestants",
        nargs="*",
        choices=tuple(plain),
        default=list(plain),
        help="Those without a LoRA. Default: all.",
    )


def contestants(args: argparse.Namespace, plain: dict[str, Scheme]) -> Iterator[tuple[str, Scheme, SVIPipeline]]:
    """Name, scheme and pipeline of everyone; LoRAs are fused. What is wrong with a file is told before the first."""
    found = {name: (None, plain[name]) for name in args.contestants}
    for entry in args.lora:
        name, separator, file = entry.partition("=")
        if not separator:
            raise ValueError(f"`--lora` takes NAME=FILE, got {entry!r}.")
        found[name] = (file, lora_scheme(file))
    for name, (file, scheme) in found.items():
        yield name, scheme, load_fused(args.model_dir, file, args.device, DTYPES[args.dtype])


def lora_scheme(file: str) -> Scheme:
    """What the file says it was trained for."""
    scheme = read_lora(file).conditioning
    if scheme is None:
        raise ValueError(f"`--lora`: {file} does not say what scheme it was trained for.")
    return scheme


def load_fused(
    model_dir: str, lora: str | None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SVIPipeline:
    """The model, with the LoRA of a file fused into it if there is one."""
    pipe = SVIPipeline.from_pretrained(model_dir, dtype={"vae": torch.float32, "default": dtype}).to(device)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe
