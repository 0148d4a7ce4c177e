"""Train the VAE of svi-tiny, an `AutoencoderKLWan`, on the procedural world.

    python examples/svi_tiny/train_vae.py --output_dir models/svi-tiny

Besides reconstruction it learns to bear its own round trip: once it is halfway good, a share of every batch is what it
made of a clip itself, one to three times over, to be turned into the clip as it was. Chained clips are decoded and
encoded again and again, and a VAE that drifts on its own would hide everything else.

Most of the error lies in the few pixels of the sprite. With `--crop_size` three of four steps see windows around it,
which also costs less. The others see whole frames.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, unpatchify
from training import (
    Record,
    add_shared_options,
    checkpoint,
    cosine_schedule,
    matrix_optimizer,
    resume,
    sample_clip,
    to_pixels,
    training_steps,
)

from diffusers_svi.tiny import world


Z_DIM = 48
HELD_OUT = 2**31  # clips with an index from here on are never trained on


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Model folder; the VAE goes into its `vae`.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("outputs/svi-tiny-vae"), help="For interrupted runs."
    )
    parser.add_argument("--init_from", type=Path, help="Folder of a trained VAE to go on from, instead of scratch.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--train_batch_size", type=int, default=4, help="Clips a step.")
    parser.add_argument("--crop_size", type=int, default=world.SIZE, help="Of windows around the sprite, in pixels.")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--decoder_only",
        action="store_true",
        help="Train the decoder alone: latents, and a transformer trained on them, stay as they are.",
    )
    parser.add_argument("--mse_weight", type=float, default=2.0, help="Of the mean squared error, beside L1.")
    parser.add_argument(
        "--frame_power",
        type=float,
        default=1.0,
        help="Of the power mean of a batch's squared error over frames: the higher, the more the worst frames count.",
    )
    parser.add_argument(
        "--shade_weight",
        type=float,
        default=0.0,
        help="Of the squared error of means over 16 x 16 pixels: small errors that round trips add up.",
    )
    parser.add_argument(
        "--kl_weight", type=float, default=1e-4, help="Weight of the KL divergence, mean over latents."
    )
    parser.add_argument(
        "--round_trips_from", type=float, default=0.3, help="Share of the run before round trips begin."
    )
    parser.add_argument(
        "--still_clips", action="store_true", help="Before round trips begin, every fourth step sees stills."
    )
    add_shared_options(parser)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--validation_steps", type=int, default=250)
    parser.add_argument("--num_validation_clips", type=int, default=16)
    parser.add_argument("--num_statistics_clips", type=int, default=256, help="Whose latents are measured at the end.")
    return parser.parse_args()


def build_vae() -> AutoencoderKLWan:
    """A small relative of the Wan 2.2 VAE: residual, 8x in space, 4x in time, 48 channels."""
    vae = AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=32,
        z_dim=Z_DIM,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        latents_mean=[0.0] * Z_DIM,
        latents_std=[1.0] * Z_DIM,
    )
    # Residual branches start at zero, so that the averaging shortcuts carry the image from the first step on.
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    # Latents are small at first: with the default log-variance of about 0, sampling would drown them.
    torch.nn.init.constant_(vae.quant_conv.bias[Z_DIM:], -6.0)
    return vae


def window_around_sprite(states: list[world.State], size: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a window of a film in which the sprite is seen, if there is one."""
    shown = [state.sprite for state in states if state.sprite is not None]
    if shown and rng.random() < 0.8:
        sprite = shown[rng.integers(len(shown))]
        corner = np.array([sprite.y, sprite.x]) - size / 2 + rng.uniform(-size / 4, size / 4, size=2)
    else:
        corner = rng.uniform(0, world.SIZE - size, size=2)
    # Patches and 8-fold compression: a window begins where the latents of the whole frame do.
    top, left = (np.clip(corner, 0, world.SIZE - size) / 8).round().astype(int) * 8
    return slice(top, top + size), slice(left, left + size)


def sample_batch(args: argparse.Namespace, step: int, rng: np.random.Generator) -> np.ndarray:
    """Clips `(batch, frames, size, size, 3)` of a step, uint8: whole frames, or windows of them."""
    first = step * args.train_batch_size
    stories = [world.sample_story(args.seed, first + i) for i in range(args.train_batch_size)]
    films = [world.film(*story) for story in stories]
    if args.crop_size == world.SIZE or step // 4 % 4 == 0:
        return np.stack([world.render(film) for film in films])
    windows = [window_around_sprite(film, args.crop_size, rng) for film in films]
    return np.stack([world.render(film)[:, rows, cols] for film, (rows, cols) in zip(films, windows, strict=True)])


def decode(vae: AutoencoderKLWan, latents: torch.Tensor, first_latent: int = 0) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which would stop the gradient.

    Gives the frames from latent `first_latent` on; those before it are decoded without gradient.
    """
    vae.clear_cache()
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and index >= first_latent):
            hidden = vae.post_quant_conv(latents[:, :, index : index + 1])
            chunk = vae.decoder(hidden, vae._feat_map, vae._conv_idx, first_chunk=index == 0)
        if index >= first_latent:
            frames.append(chunk)
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def eight_bits(pixels: torch.Tensor) -> torch.Tensor:
    """What is left of pixels in [-1, 1] in an image."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def flat_convolutions(vae: AutoencoderKLWan) -> dict[torch.nn.Parameter, torch.nn.Parameter]:
    """Convolution kernels as matrices in the same memory: `torch.optim.Muon` takes no other shape."""
    kernels = [p for p in vae.parameters() if p.requires_grad and p.ndim >= 4 and p.shape[0] > 3]
    return {kernel: torch.nn.Parameter(kernel.data.view(kernel.shape[0], -1)) for kernel in kernels}


@torch.no_grad()
def own_output(vae: AutoencoderKLWan, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """What is left of `pixels` after one to three round trips through the VAE and 8 bits a channel."""
    for _ in range(rng.integers(1, 4)):
        pixels = eight_bits(vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float())
    return pixels


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the reconstruction of clips, in dB: mean over their frames, and that of the worst frame over all clips."""
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float()
    per_frame = 10 * torch.log10(4 / (decoded - pixels).square().mean(dim=(0, 1, 3, 4)))
    return {"psnr": per_frame.mean(), "psnr_worst_frame": per_frame.min()}


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, seed: int, num_clips: int, batch_size: int = 16) -> None:
    """Write the mean and standard deviation of the latents of training clips into the VAE's config."""
    latents = []
    for first in range(0, num_clips, batch_size):
        clips = [sample_clip(seed, index)[1] for index in range(first, min(first + batch_size, num_clips))]
        latents.append(vae.encode(to_pixels(np.stack(clips))).latent_dist.mode())
    latents = torch.cat(latents)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def held_out_clips(seed: int, count: int) -> torch.Tensor:
    """`(count, 3, frames, height, width)` in [-1, 1]."""
    return to_pixels(np.stack([sample_clip(seed, HELD_OUT + i)[1] for i in range(count)]))


def save(vae: AutoencoderKLWan, output_dir: Path, record: Record) -> None:
    """Into `output_dir/vae`, and end the record beside it."""
    vae.half()  # half the bytes: loading turns them into float32 again
    vae.save_pretrained(output_dir / "vae")
    record.write(parameters=sum(p.numel() for p in vae.parameters()))


def main():
    args = parse_args()
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    vae = build_vae() if args.init_from is None else AutoencoderKLWan.from_pretrained(args.init_from)
    vae.to(accelerator.device)
    accelerator.print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    flat = flat_convolutions(vae)
    others = [p for p in vae.parameters() if p.requires_grad and p not in flat]
    optimizers = [
        matrix_optimizer(args, flat.values(), weight_decay=0.0),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [cosine_schedule(optimizer, 100, args.max_train_steps) for optimizer in optimizers]
    vae, *prepared = accelerator.prepare(vae, *optimizers, *schedules)
    optimizers, schedules = prepared[:2], prepared[2:]
    first_step = resume(accelerator, args.checkpoint_dir)

    record = Record(args.output_dir / "training" / "vae.json", args.seed)
    held_out = held_out_clips(args.seed, args.num_validation_clips).to(accelerator.device)
    progress = training_steps(accelerator, first_step, args.max_train_steps, "VAE")
    for step in progress:
        rng = np.random.default_rng([args.seed, step])
        target = to_pixels(sample_batch(args, step, rng)).to(accelerator.device)
        with accelerator.autocast():
            inputs, still = target, args.still_clips and step % 4 == 1
            if step >= args.round_trips_from * args.max_train_steps and step % 2:
                inputs, still = own_output(vae, target, rng), step % 4 == 3
            if still:
                # Clips of one frame, as the end of one clip becomes the beginning of the next.
                frame = rng.integers(target.shape[2])
                inputs, target = (video[:, :, frame, None].expand_as(target) for video in (inputs, target))
            posterior = vae.encode(inputs).latent_dist
            decoded = decode(vae, posterior.sample())
        error = decoded.float() - target
        squared = error.square().mean(dim=(0, 1, 3, 4)).pow(args.frame_power).mean().pow(1 / args.frame_power)
        reconstruction = error.abs().mean() + args.mse_weight * squared
        if args.shade_weight:
            blocks = torch.nn.functional.avg_pool3d(error, (1, 16, 16))
            reconstruction = reconstruction + args.shade_weight * blocks.square().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        accelerator.backward(reconstruction + args.kl_weight * kl)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        for kernel, matrix in flat.items():
            matrix.grad = kernel.grad.view_as(matrix)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        vae.zero_grad()

        if (step + 1) % args.validation_steps == 0 or step + 1 == args.max_train_steps:
            record.add(step + 1, progress, loss=reconstruction.detach(), kl=kl.detach(), **psnr(vae, held_out))
        if (step + 1) % args.checkpointing_steps == 0:
            checkpoint(accelerator, args.checkpoint_dir, step + 1)

    vae = accelerator.unwrap_model(vae).cpu()
    if not args.decoder_only:
        set_latent_statistics(vae, args.seed, args.num_statistics_clips)
    save(vae, args.output_dir, record)
    accelerator.print(f"Saved {args.output_dir / 'vae'}.")


if __name__ == "__main__":
    main()
