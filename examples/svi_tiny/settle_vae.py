"""Teach svi-tiny's VAE to leave a still that it has made as it is, where the world leaves a choice.

    python examples/svi_tiny/settle_vae.py --init_from models/svi-tiny/vae --output_dir outputs/svi-tiny-settled

Two cores do more as two processes of one thread than as one of two: `--compile`, and in place of `python`
`OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true torchrun --nproc_per_node=2`.

A round trip changes the colours of a still by two thousandths of the range, but in nearly the same direction as the
round trip before it: fifty of them are a drift. How a scene looks can be known by heart, and the VAE learns to put it
right: the encoder gives the latents of the nearest picture of the scene, in the light which the still is in by now,
and the decoder that picture. What the light was before, nobody can tell from what has become of it; that it should
stay as it is can be learnt. Sprites stay as they are.

Films are encoded and decoded as before, so latents, and what was trained on them, stay valid.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan
from tqdm.auto import tqdm
from train_vae import HELD_OUT, decode, eight_bits, held_out_clips, psnr, save
from training import Record, checkpoint, cosine_schedule, resume, sample_clip, to_pixels, training_steps

from diffusers_svi.tiny import world
from diffusers_svi.tiny.tracker import sprite_mask


# Side of a window in pixels: weight of the squared error, in percent of the range, of means over such windows.
SCALES = {1: 0.1, 4: 0.25, 8: 0.5, 16: 1.0, world.SIZE: 24.0}
# Weights of the squared error of latents, in standard deviations: of stills, and of clips.
STILL_LATENTS, CLIP_LATENTS = 100.0, 200.0
# Index of the first clip in which something moves: stills are made of films before it.
MOVING = 2**30
# Of the shades laid over every second new still, in [-1, 1]: chains lead further than the world.
SHADE = 0.02
# Light beyond this is put right too. Were it the world's own range, light near its ends would be drawn inwards.
LIGHT = (world.LIGHT[0] - 0.05, world.LIGHT[1] + 0.05)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", type=Path, required=True, help="Folder of the VAE to begin with.")
    parser.add_argument(
        "--clips_as_in", type=Path, help="Folder of the VAE whose latents and clips are kept. [`--init_from`]"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Model folder; the VAE goes into its `vae`.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=Path("outputs/svi-tiny-settle"), help="For interrupted runs."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_train_steps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=8, help="Stills a step and process, from its memory.")
    parser.add_argument(
        "--new_stills_every",
        type=int,
        default=10,
        help="Steps after which a batch of new stills comes into the memory.",
    )
    parser.add_argument("--memory_size", type=int, default=112, help="Stills a process; the oldest are forgotten.")
    parser.add_argument("--first_batches", type=int, default=12, help="Batches in the memory before the first step.")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument(
        "--clips_every", type=int, default=4, help="Steps after which a clip is seen, which then counts as often."
    )
    parser.add_argument("--compile", action="store_true", help="Compile the VAE: a minute at the start, faster then.")
    parser.add_argument("--checkpointing_steps", type=int, default=100)
    parser.add_argument("--validation_steps", type=int, default=100)
    parser.add_argument("--num_validation_clips", type=int, default=16)
    return parser.parse_args()


@dataclass
class Still:
    """What the VAE made of the picture of `state`, `(3, height, width)`, and what it is to make of that."""

    state: world.State
    frame: torch.Tensor
    target: torch.Tensor


class Stills:
    """A memory of stills, each as old as the number of its round trips."""

    def __init__(self, vae: AutoencoderKLWan, seed: int, size: int):
        self.vae, self.seed, self.size = vae, seed, size
        self.stills: list[Still] = []

    @torch.no_grad()
    def make(self, indices, rng: np.random.Generator) -> None:
        """Add what one round trip makes of the first frames of films; every second of them is shaded."""
        states = first_states(self.seed, indices)
        frames = draw(states).to(self.vae.device)
        for frame in frames[::2]:
            frame += shade(rng).to(frame)
        self.stills += self._stills(states, round_trip(self.vae, frames))
        del self.stills[: -self.size]

    def sample(self, count: int, rng: np.random.Generator) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Numbers of stills, their frames `(count, 3, height, width)`, and the frames to be made of them."""
        chosen = rng.permutation(len(self.stills))[:count].tolist()
        stills = [self.stills[i] for i in chosen]
        return (
            chosen,
            torch.stack([still.frame for still in stills]),
            torch.stack([still.target for still in stills]),
        )

    @torch.no_grad()
    def move_on(self, chosen: list[int], decoded: torch.Tensor) -> None:
        """Put what the decoder made of stills, in [-1, 1], in their places."""
        states = [self.stills[i].state for i in chosen]
        for i, still in zip(chosen, self._stills(states, eight_bits(decoded)), strict=True):
            self.stills[i] = still

    def _stills(self, states: list[world.State], frames: torch.Tensor) -> list[Still]:
        states, targets = nearest(states, frames)
        return [Still(*still) for still in zip(states, frames, targets, strict=True)]


def first_states(seed: int, indices) -> list[world.State]:
    return [world.sample_story(seed, index)[0] for index in indices]


def draw(states: list[world.State]) -> torch.Tensor:
    """`(states, 3, height, width)`, in [-1, 1]."""
    return to_pixels(world.render(states)[:, None])[:, :, 0]


def scene_alone(state: world.State) -> np.ndarray:
    """Which pixels `(height, width)` are well off the sprite."""
    mask = torch.from_numpy(sprite_mask(state))[None].float()
    return torch.nn.functional.max_pool2d(mask, 5, stride=1, padding=2)[0].numpy() == 0


def lights(states: list[world.State], frames: torch.Tensor) -> np.ndarray:
    """The light `(states, 3)` in which frames in [-1, 1] show the scenes of `states`: least squares off the sprite."""
    found = []
    for state, frame in zip(states, (frames.cpu().double().numpy() + 1) * 127.5, strict=True):
        seen = scene_alone(state)
        scene = world.scene_pixels(state.scene, state.offset)[seen].T
        found.append((frame[:, seen] * scene).sum(axis=1) / (scene * scene).sum(axis=1))
    return np.stack(found)


def nearest(states: list[world.State], frames: torch.Tensor) -> tuple[list[world.State], torch.Tensor]:
    """`states` in the light that frames show, within `LIGHT`, and how their scenes look then.

    Sprites stay as the frames show them: what they have lost cannot be known.
    """
    found = lights(states, frames).clip(*LIGHT)
    states = [replace(state, light=tuple(light)) for state, light in zip(states, found.tolist(), strict=True)]
    alone = torch.from_numpy(np.stack([scene_alone(state) for state in states]))[:, None].to(frames.device)
    return states, torch.where(alone, draw(states).to(frames.device), frames)


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


def drift(vae: AutoencoderKLWan, states: list[world.State]) -> dict[str, float]:
    """What the third round trip does to stills, root mean squares.

    `light_change` is the change of their light, `scene_error` how far from the nearest picture of the scene they are
    then, in means over 16 x 16 pixels, of the range.
    """
    frames = draw(states).to(vae.device)
    for _ in range(3):
        before, frames = frames, round_trip(vae, frames)
    change = lights(states, frames) - lights(states, before)
    error = (frames - nearest(states, frames)[1]) / 2
    return {
        "light_change": float(np.sqrt(np.square(change).mean())),
        "scene_error": float(torch.nn.functional.avg_pool2d(error, 16).square().mean().sqrt()),
    }


def main():
    args = parse_args()
    set_seed(args.seed)
    # What is learnt is a small part of a level: no half precision.
    accelerator = Accelerator(mixed_precision="no", step_scheduler_with_optimizer=False)
    vae = AutoencoderKLWan.from_pretrained(args.init_from).to(accelerator.device)
    reference = AutoencoderKLWan.from_pretrained(args.clips_as_in or args.init_from)
    reference.to(accelerator.device).requires_grad_(False)
    latents_std = torch.tensor(reference.config.latents_std, device=accelerator.device).view(1, -1, 1, 1, 1)
    halves = [
        [*vae.encoder.parameters(), *vae.quant_conv.parameters()],
        [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()],
    ]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = cosine_schedule(optimizer, 20, args.max_train_steps)
    # Without a wrapper, which would hide encoder and decoder: gradients are averaged below.
    vae = accelerator.prepare_model(vae, evaluation_mode=True)
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    rank, processes = accelerator.process_index, accelerator.num_processes
    first_step = resume(accelerator, args.checkpoint_dir)
    if args.compile:
        for half in (vae.encoder, vae.decoder):
            half.compile(dynamic=False, recompile_limit=32)

    def films(batch: int) -> range:
        """Indices of the films of a batch of new stills, of this process alone."""
        first = (batch * processes + rank) * args.train_batch_size
        return range(first, first + args.train_batch_size)

    def latents_error(latents: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return ((latents - wanted) / latents_std).square().mean()

    stills = Stills(vae, args.seed, args.memory_size)
    forgotten = first_step // args.new_stills_every
    batches = range(forgotten, forgotten + args.first_batches)
    for batch in tqdm(batches, desc="Stills", disable=not accelerator.is_main_process):
        stills.make(films(batch), np.random.default_rng([args.seed, batch, rank]))

    record = Record(args.output_dir / "training" / "vae.json", args.seed)
    record.values["processes"] = processes
    clips = held_out_clips(args.seed, args.num_validation_clips).to(accelerator.device)
    held_out = first_states(args.seed, range(HELD_OUT, HELD_OUT + args.num_validation_clips))
    progress = training_steps(accelerator, first_step, args.max_train_steps, "VAE")
    for step in progress:
        rng = np.random.default_rng([args.seed, step, rank, 1])
        if step % args.new_stills_every == 0:
            stills.make(films(args.first_batches + step // args.new_stills_every), rng)
        chosen, frames, targets = stills.sample(args.train_batch_size, rng)
        with torch.no_grad():
            wanted = encode_still(reference, targets)
        latents = encode_still(vae, frames)
        decoded = decode(vae, latents, first_latent=latents.shape[2] - 1)
        # From the range [-1, 1] to percent of it.
        still_loss = error_of_scales(50 * (decoded - targets[:, :, None]))
        still_latents = latents_error(latents, wanted)
        accelerator.backward(still_loss + STILL_LATENTS * still_latents)
        stills.move_on(chosen, decoded[:, :, -1])
        if (step - first_step) % args.clips_every == 0:
            clip = to_pixels(sample_clip(args.seed, MOVING + step * processes + rank)[1][None]).to(accelerator.device)
            with torch.compiler.set_stance("force_eager"):
                # A film, and the condition that begins with its first frame.
                videos = torch.cat([clip, clip])
                videos[1, :, 1:] = 0
                with torch.no_grad():
                    wanted = reference.encode(videos).latent_dist.mode()
                clip_latents = latents_error(vae.encode(videos).latent_dist.mode(), wanted)
                # The first frame, which stills say nothing of, and one of the latents after it.
                parts = [wanted[:1, :, :1], wanted[:1, :, : int(rng.integers(2, wanted.shape[2] + 1))]]
                errors = [
                    decode(vae, part, part.shape[2] - 1) - decode(reference, part, part.shape[2] - 1) for part in parts
                ]
                clip_loss = sum((50 * error).square().mean() for error in errors) / 2
                accelerator.backward(args.clips_every * (clip_loss + CLIP_LATENTS * clip_latents))
        for parameters in halves:
            for parameter in parameters:
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if accelerator.is_main_process and (
            (step + 1) % args.validation_steps == 0 or step + 1 == args.max_train_steps
        ):
            with torch.compiler.set_stance("force_eager"):
                figures = {**drift(vae, held_out), **psnr(vae, clips)}
            record.add(
                step + 1,
                progress,
                still_loss=still_loss.detach(),
                clip_loss=clip_loss.detach(),
                still_latents_rms=still_latents.detach().sqrt(),
                clip_latents_rms=clip_latents.detach().sqrt(),
                **figures,
            )
        if (step + 1) % args.checkpointing_steps == 0:
            checkpoint(accelerator, args.checkpoint_dir, step + 1)

    if accelerator.is_main_process:
        save(vae.cpu(), args.output_dir, record)
        accelerator.print(f"Saved {args.output_dir / 'vae'}.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
