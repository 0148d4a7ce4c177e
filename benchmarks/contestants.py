"""Who takes part in a benchmark of svi-tiny: the base model with a scheme, or with a LoRA that brings its own."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from diffusers_svi import SVIPipeline
from diffusers_svi.conditioning import Scheme
from diffusers_svi.lora import read_lora


ROOT = Path(__file__).parents[1]
# Films of this seed are never trained on.
HELD_OUT_SEED = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_contestant_options(parser: argparse.ArgumentParser, plain: dict[str, Scheme]) -> None:
    parser.add_argument(
        "--model_dir", default=str(ROOT / "models" / "svi-tiny"), help="Folder or Hub name. Default: svi-tiny."
    )
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
        lora = read_lora(file)
        if lora.conditioning is None:
            raise ValueError(f"`--lora {entry}`: the file does not say what scheme it was trained for.")
        found[name] = (file, lora.conditioning)
    for name, (file, scheme) in found.items():
        dtypes = {"vae": torch.float32, "default": DTYPES[args.dtype]}
        pipe = SVIPipeline.from_pretrained(args.model_dir, dtype=dtypes).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        if file is not None:
            pipe.load_lora_weights(file)
            pipe.fuse_lora()
        yield name, scheme, pipe
