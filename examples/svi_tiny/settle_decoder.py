"""Teach the decoder of svi-tiny's VAE to leave a still that it has made as it is.

    python examples/svi_tiny/settle_decoder.py --init_from models/svi-tiny/vae --output_dir outputs/svi-tiny-settled

A round trip changes the colours of a still by two thousandths of the range, but in nearly the same direction as the
round trip before it: fifty of them are a drift. What a still was before nobody can tell from what has become of it;
that it should stay as it is can be learnt. The decoder learns it from stills that went through the VAE a few times, at
all scales from a frame's mean to its pixels. Everything it learns from is within its reach: new stills, whose detail
the latents cannot hold, are left out, and clips in which something moves are to be decoded as they were before.

The encoder stays as it is, so latents, and what was trained on them, stay valid.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from tqdm.auto import tqdm
from train_vae import decode, eight_bits, freeze_encoder, held_out_clips, psnr, save
from training import Record, checkpoint, cosine_schedule, resume, sample_clip, to_pixels

from diffusers_svi.tiny import world


# Side of a window in pixels: weight of the squared error of means over such windows.
SCALES = {1: 0.1, 4: 0.25, 8: 0.5, 16: 1.0, world.SIZE: 2.0}
# Index of the first clip in which something moves: stills are made of films before it.
MOVING = 2**30
# Of the shades laid over every second new still, in [-1, 1]: chains lead further than the light of the world.
SHADE = 0.05


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", type=Path, required=True, help="Folder of the VAE to begin with.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Model folder; the VAE goes into its `vae`.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("outputs/svi-tiny-settle"), help="For interrupted runs."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=16, help="Stills a step, from the memory.")
    parser.add_argument("--new_stills", type=int, default=4, help="Stills a step that the VAE makes for the memory.")
    parser.add_argument("--memory_size", type=int, default=2048, help="Stills; the oldest are forgotten.")
    parser.add_argument("--first_stills", type=int, default=256, help="Stills in the memory before the first step.")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--clip_weight", type=float, default=0.5, help="Of the clip that is decoded as it was before.")
    parser.add_argument("--checkpointing_steps", type=int, default=100)
    parser.add_argument("--validation_steps", type=int, default=100)
    parser.add_argument("--num_validation_clips", type=int, default=16)
    return parser.parse_args()


class Stills:
    """A memory of `(3, height, width)` frames that the VAE made of stills, and of their latents."""

    def __init__(self, vae: AutoencoderKLWan, seed: int, size: int, made: int = 0):
        self.vae, self.seed, self.size, self.made = vae, seed, size, made
        self.frames: list[torch.Tensor] = []
        self.latents: list[torch.Tensor] = []

    @torch.no_grad()
    def make(self, count: int, rng: np.random.Generator) -> None:
        """Add `count` stills of films never seen before after one to three round trips."""
        indices = range(self.made, self.made + count)
        self.made += count
        frames = first_frames(self.seed, indices).to(self.vae.device)
        for frame in frames[::2]:
            frame += shade(rng).to(frame)
        for _ in range(rng.integers(1, 4)):
            frames = round_trip(self.vae, frames)
        self.frames += frames.unbind()
        self.latents += encode_still(self.vae, frames).unbind()
        del self.frames[: -self.size], self.latents[: -self.size]

    def sample(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `(count, 3, height, width)` and latents of different stills."""
        chosen = rng.permutation(len(self.frames))[:count]
        return torch.stack([self.frames[i] for i in chosen]), torch.stack([self.latents[i] for i in chosen])


def first_frames(seed: int, indices) -> torch.Tensor:
    """`(films, 3, height, width)`, in [-1, 1]."""
    states = [world.sample_story(seed, index)[0] for index in indices]
    return to_pixels(np.stack([world.render(state) for state in states])[:, None])[:, :, 0]


def shade(rng: np.random.Generator) -> torch.Tensor:
    """Smooth colours `(3, height, width)`: one over the whole frame and one of four by four."""
    coarse = rng.normal(scale=SHADE, size=(1, 3, 1, 1)) + rng.normal(scale=SHADE, size=(1, 3, 4, 4))
    return torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(world.SIZE,) * 2, mode="bicubic")[0]


def encode_still(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """Latents of clips in which nothing changes, from their frames `(batch, 3, height, width)`."""
    clips = frames[:, :, None].expand(-1, -1, world.CLIP_FRAMES, -1, -1)
    return vae.encode(clips).latent_dist.mode()


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """The last frames of stills that were encoded and decoded, as images hold them."""
    return eight_bits(vae.decode(encode_still(vae, frames)).sample[:, :, -1].float())


def error_of_scales(error: torch.Tensor) -> torch.Tensor:
    """Squared `(batch, 3, frames, height, width)` error of means over windows, weighted as in `SCALES`."""
    means = {size: torch.nn.functional.avg_pool3d(error, (1, size, size)) for size in SCALES}
    return sum(weight * means[size].square().mean() for size, weight in SCALES.items())


def changes(vae: AutoencoderKLWan, frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the third round trip of stills changes, of the range: root mean squares of means over two windows."""
    before = round_trip(vae, round_trip(vae, frames))
    change = (round_trip(vae, before) - before) / 2
    return {
        f"change_{size}": torch.nn.functional.avg_pool2d(change, size).square().mean().sqrt()
        for size in (16, world.SIZE)
    }


def main():
    args = parse_args()
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision="no")  # what is learnt is a small part of a level
    vae = AutoencoderKLWan.from_pretrained(args.init_from).to(accelerator.device)
    before = copy.deepcopy(vae).requires_grad_(False)
    freeze_encoder(vae)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = cosine_schedule(optimizer, 30, args.max_train_steps)
    vae, optimizer, schedule = accelerator.prepare(vae, optimizer, schedule)
    first_step = resume(accelerator, args.checkpoint_dir)
    stills = Stills(vae, args.seed, args.memory_size, made=first_step * args.new_stills)
    for batch in tqdm(range(args.first_stills // 8), desc="Stills"):
        stills.make(8, np.random.default_rng([args.seed, first_step, batch]))

    record = Record(args.output_dir / "training" / "vae.json", args.seed)
    clips = held_out_clips(args.seed, args.num_validation_clips).to(accelerator.device)
    progress = tqdm(
        range(first_step, args.max_train_steps), initial=first_step, total=args.max_train_steps, desc="Decoder"
    )
    for step in progress:
        rng = np.random.default_rng([args.seed, step])
        stills.make(args.new_stills, rng)
        frames, latents = stills.sample(args.train_batch_size, rng)
        clip = to_pixels(sample_clip(args.seed, MOVING + step)[1][None]).to(accelerator.device)
        with torch.no_grad():
            clip_latents = vae.encode(clip).latent_dist.mode()
            clip_before = decode(before, clip_latents)
        still_error = decode(vae, latents, first_latent=latents.shape[2] - 1) - frames[:, :, None]
        clip_error = decode(vae, clip_latents) - clip_before
        # From the range [-1, 1] to percent of it.
        still_loss = error_of_scales(50 * still_error)
        clip_loss = (50 * clip_error).square().mean()
        accelerator.backward(still_loss + args.clip_weight * clip_loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if (step + 1) % args.validation_steps == 0 or step + 1 == args.max_train_steps:
            held_out_psnr = psnr(vae, clips)
            figures = {
                "still_loss": still_loss.detach(),
                "clip_loss": clip_loss.detach(),
                **changes(vae, clips[:, :, 0]),
                "psnr": held_out_psnr.mean(),
                "psnr_worst_frame": held_out_psnr.min(),
            }
            record.add(step + 1, **figures)
            progress.set_postfix({name: f"{float(value):.4g}" for name, value in figures.items()})
        if (step + 1) % args.checkpointing_steps == 0:
            checkpoint(accelerator, args.checkpoint_dir, step + 1)

    vae = accelerator.unwrap_model(vae).cpu()
    save(vae, args.output_dir, record)
    accelerator.print(f"Saved {args.output_dir / 'vae'}.")


if __name__ == "__main__":
    main()
