"""Train the VAE of svi-tiny, an `AutoencoderKLWan`, on the procedural world.

    PYTHONPATH=examples python -m svi_tiny.train_vae --output_dir outputs/svi-tiny

Besides reconstruction it learns to bear its own round trip: once it is halfway good, every other batch is what it made
of clips itself, one to three times over, to be turned into the clips as they were. Chained clips are decoded and
encoded again and again, and a VAE that drifts on its own would hide everything else.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, unpatchify

from diffusers_svi.pixels import from_uint8, to_uint8

from .sizes import SIZES, Size
from .training import (
    HELD_OUT,
    Checkpoints,
    Deadline,
    Record,
    add_shared_options,
    clip_batches,
    cosine_schedule,
    matrix_optimizer,
    sample_clips,
    stop_unfinished,
    training_steps,
)


Z_DIM = 48


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Model folder; the VAE goes into its `vae`.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("outputs/svi-tiny-vae"), help="For interrupted runs."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=8000)
    parser.add_argument("--train_batch_size", type=int, default=4, help="Clips a step.")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--kl_weight", type=float, default=1e-4, help="Weight of the KL divergence, mean over latents."
    )
    parser.add_argument(
        "--round_trips_from", type=float, default=0.3, help="Share of the run before round trips begin."
    )
    add_shared_options(parser)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--validation_steps", type=int, default=250)
    parser.add_argument("--num_validation_clips", type=int, default=16)
    parser.add_argument("--num_statistics_clips", type=int, default=256, help="Whose latents are measured at the end.")
    return parser.parse_args()


def build_vae(size: Size = SIZES["tiny"]) -> AutoencoderKLWan:
    """A small relative of the Wan 2.2 VAE: residual, 8x in space, 4x in time, 48 channels."""
    vae = AutoencoderKLWan(
        base_dim=size.vae_dim,
        decoder_base_dim=size.vae_dim,
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


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """`vae.decode` without its clamp to [-1, 1], which would stop the gradient."""
    vae.clear_cache()
    frames = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        hidden = vae.post_quant_conv(latents[:, :, index : index + 1])
        frames.append(vae.decoder(hidden, vae._feat_map, vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), vae.config.patch_size)


def flat_convolutions(vae: AutoencoderKLWan) -> dict[torch.nn.Parameter, torch.nn.Parameter]:
    """Convolution kernels as matrices in the same memory: `torch.optim.Muon` takes no other shape."""
    kernels = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 3]
    return {kernel: torch.nn.Parameter(kernel.data.view(kernel.shape[0], -1)) for kernel in kernels}


@torch.no_grad()
def own_output(vae: AutoencoderKLWan, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """What is left of `pixels` after one to three round trips through the VAE and 8 bits a channel."""
    for _ in range(rng.integers(1, 4)):
        pixels = from_uint8(to_uint8(vae.decode(vae.encode(pixels).latent_dist.mode()).sample))
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
        _, pixels = sample_clips(seed, range(first, min(first + batch_size, num_clips)), vae.device)
        latents.append(vae.encode(pixels).latent_dist.mode())
    latents = torch.cat(latents)
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def main():
    args = parse_args()
    deadline = Deadline(args.max_minutes)
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    vae = build_vae(SIZES[args.size]).to(device)
    accelerator.print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    checkpoints = Checkpoints(args.checkpoint_dir, {"vae": vae}, args.weights_only)
    first_step = checkpoints.load_weights()
    if first_step:  # else every part would draw the noise of the first
        set_seed(args.seed + first_step)
    flat = flat_convolutions(vae)
    others = [p for p in vae.parameters() if p not in flat]
    optimizers = [
        matrix_optimizer(args, flat.values(), weight_decay=0.0),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [cosine_schedule(optimizer, 100, args.max_train_steps, first_step) for optimizer in optimizers]
    vae, *prepared = accelerator.prepare(vae, *optimizers, *schedules)
    optimizers, schedules = prepared[:2], prepared[2:]
    if not args.weights_only:
        first_step = checkpoints.load_everything(accelerator)

    record = Record(args.output_dir / "training" / "vae.json", args.seed)
    _, held_out = sample_clips(args.seed, range(HELD_OUT, HELD_OUT + args.num_validation_clips), device)
    progress = training_steps(accelerator, first_step, args.max_train_steps, "VAE")
    numbers = [
        range(step * args.train_batch_size, (step + 1) * args.train_batch_size)
        for step in range(first_step, args.max_train_steps)
    ]
    batches = clip_batches(args.seed, numbers, device, args.dataloader_num_workers)
    for step, (_, target) in zip(progress, batches, strict=True):
        rng = np.random.default_rng([args.seed, step])
        with accelerator.autocast():
            inputs = target
            if step >= args.round_trips_from * args.max_train_steps and step % 2:
                inputs = own_output(vae, target, rng)
                if step % 4 == 3:
                    # Clips of one frame, as the end of one clip becomes the beginning of the next.
                    frame = rng.integers(target.shape[2])
                    inputs, target = (video[:, :, frame, None].expand_as(target) for video in (inputs, target))
            posterior = vae.encode(inputs).latent_dist
            decoded = decode(vae, posterior.sample())
        error = decoded.float() - target
        reconstruction = error.abs().mean() + 2 * error.square().mean()
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
        over = deadline.over() and step + 1 < args.max_train_steps
        if over or (step + 1) % args.checkpointing_steps == 0:
            checkpoints.save(accelerator, step + 1)
        if over:
            record.write()
            stop_unfinished(step + 1, args.max_train_steps, "steps of the VAE")

    vae = accelerator.unwrap_model(vae)
    set_latent_statistics(vae, args.seed, args.num_statistics_clips)
    vae.half()  # half the bytes: loading turns them into float32 again
    vae.save_pretrained(args.output_dir / "vae")
    record.write(parameters=sum(p.numel() for p in vae.parameters()))
    accelerator.print(f"Saved {args.output_dir / 'vae'}.")


if __name__ == "__main__":
    main()
