"""Measure svi-tiny: its VAE, its first clips, and how it drifts when it is chained.

    PYTHONPATH=examples python -m svi_tiny.evaluate --output_dir docs/results/svi_tiny

Everything is compared with the truth, which the world knows for every frame. Writes `svi_tiny.json` and a plot,
`drift.png`. Films of seed 1 are measured; svi-tiny was trained on films of seed 0.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm

from diffusers_svi import LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.wan import decode_video, encode_video

from . import world
from .tracker import displacement, sprite_mask, track
from .training import provenance, to_pixels


matplotlib.use("Agg")
import matplotlib.pyplot as plt


HELD_OUT_SEED = 1


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", default=Path(__file__).parent / "model", help="Default: svi-tiny.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/svi-tiny-evaluation"))
    parser.add_argument(
        "--num_clips", type=int, default=50, help="Length of the chains, and round trips of the VAE alone."
    )
    parser.add_argument("--num_chains", type=int, default=48)
    parser.add_argument("--num_prompts", type=int, default=100, help="First clips that are measured.")
    parser.add_argument("--num_videos", type=int, default=64, help="Videos that the VAE reconstructs.")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    return parser.parse_args()


def psnr(error: np.ndarray, axis=None) -> np.ndarray:
    """In dB, from differences of pixels in [0, 1]."""
    return -10 * np.log10(np.square(error).mean(axis=axis))


def standard_error(values: list[float]) -> float:
    """Of the mean; 0 of a single value."""
    return np.std(values) / max(len(values) - 1, 1) ** 0.5


def generate(pipe: SVIPipeline, state: world.State, prompts: list[str], args, seed: int, conditioning=None):
    """The clips of a film as uint8 arrays, overlaps cut off."""
    clips = pipe.stream(
        image=PIL.Image.fromarray(world.render(state)),
        prompts=prompts,
        conditioning=conditioning,
        height=world.SIZE,
        width=world.SIZE,
        num_frames=world.CLIP_FRAMES,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
    )
    for clip in clips:
        yield (clip.frames * 255).round().astype(np.uint8)


@torch.no_grad()
def round_trip(pipe: SVIPipeline, frames: np.ndarray) -> np.ndarray:
    """`(frames, SIZE, SIZE, 3)` uint8 through the VAE and back."""
    pixels = decode_video(pipe.vae, encode_video(pipe.vae, to_pixels(frames[None])))
    return pipe.video_processor.postprocess_video(pixels, "np")[0]


def measure_vae(pipe: SVIPipeline, args) -> dict:
    """PSNR of held-out videos, over all pixels of all videos for every frame of a clip."""
    errors = []
    for index in tqdm(range(args.num_videos), desc="VAE"):
        state, actions = world.sample_story(HELD_OUT_SEED, index)
        clip = world.render(world.film(state, actions))
        errors.append(round_trip(pipe, clip) - clip / 255)
    errors = np.stack(errors)
    per_frame = psnr(errors, axis=(0, 2, 3, 4))
    single = psnr(errors, axis=(2, 3, 4))
    return {
        "psnr_per_frame": per_frame.tolist(),
        "psnr_worst_frame": per_frame.min(),
        "share_of_single_frames_above_33_db": (single >= 33).mean(),
        "psnr_worst_single_frame": single.min(),
    }


def measure_first_clips(pipe: SVIPipeline, args) -> dict:
    """First clips of held-out stories in which a sprite moves and stays."""
    found, background, direction, right, last_latent = [], [], [], [], []
    index = 0
    progress = tqdm(total=args.num_prompts, desc="First clips")
    while len(direction) < args.num_prompts:
        index += 1
        state, (action,) = world.sample_story(HELD_OUT_SEED, 10000 + index)
        if action.motion not in world.DIRECTIONS:
            continue
        truth = world.film(state, [action])
        (frames,) = generate(pipe, state, [world.caption(state, action)], args, seed=index)
        seen = track(frames)
        found += [observation.found for observation in seen]
        differences = np.abs(frames / 255.0 - world.render(truth) / 255.0)
        for state_, observation, difference in zip(truth, seen, differences, strict=True):
            sprite = sprite_mask(state_)
            background.append(difference[~sprite].mean())
            if state_.settled and observation.found:
                wanted = state_.sprite
                right.append(
                    (observation.shape, observation.colour, observation.size)
                    == (wanted.shape, wanted.colour, wanted.size)
                )
        step = np.array(world.DIRECTIONS[action.motion])
        moved = np.array(displacement(seen[0], seen[-1])) if seen[0].found and seen[-1].found else np.zeros(2)
        # At least half of the way, and not further to the side than a quarter of it.
        way = world.SPRITE_SPEED * (world.CLIP_FRAMES - 1)
        direction.append(moved @ step > way / 2 and np.abs(moved - (moved @ step) * step).max() < way / 4)
        with torch.no_grad():
            latents = [encode_video(pipe.vae, to_pixels(video[None])) for video in (frames, world.render(truth))]
        last_latent.append((latents[0] - latents[1])[:, :, -1].square().mean().item())
        progress.update()
    progress.close()
    return {
        "prompts": args.num_prompts,
        "sprite_found": np.mean(found),
        "sprite_right": np.mean(right),
        "background_error": np.mean(background),
        "direction_followed": np.mean(direction),
        "last_latent_rms": np.sqrt(np.mean(last_latent)),
    }


def observe(frame: np.ndarray, truth: world.State) -> dict:
    """One frame of a chain: how far from the world its background is, and whether the sprite is still the same."""
    (seen,) = track(frame[None], truth.light)
    sprite = truth.sprite
    same = seen.found and (seen.shape, seen.colour, seen.size) == (sprite.shape, sprite.colour, sprite.size)
    return {
        "background_error": seen.background_error,
        "scene_right": float(seen.scene == truth.scene),
        "sprite_right": float(same),
    }


def measure_drift(pipe: SVIPipeline, args) -> dict:
    """Chains with one prompt, re-encoded and by latent hand-over, beside the VAE alone on still clips."""
    chains = {"re-encoded": PixelMotion(1), "latent hand-over": LatentMotion(1), "VAE alone": None}
    drift = {}
    stories, index = [], 0
    while len(stories) < args.num_chains:
        index += 1
        state, actions = world.sample_story(HELD_OUT_SEED, 20000 + index, args.num_clips, "consistent")
        if state.sprite is not None:
            stories.append((index, state, actions))
    for name, scheme in chains.items():
        observed = []
        for index, state, actions in tqdm(stories, desc=f"Drift, {name}"):
            if scheme is None:
                frame, frames = world.render(state), []
                for _ in range(args.num_clips):
                    frame = (
                        (round_trip(pipe, frame[None].repeat(world.CLIP_FRAMES, 0))[-1] * 255).round().astype(np.uint8)
                    )
                    frames.append(frame)
            else:
                prompt = world.caption(state, actions[0])
                frames = [clip[-1] for clip in generate(pipe, state, [prompt] * args.num_clips, args, index, scheme)]
            observed.append([observe(frame, state) for frame in frames])
        by_chain = {
            figure: np.array([[frame[figure] for frame in chain] for chain in observed]) for figure in observed[0][0]
        }
        drift[name] = {figure: values.mean(axis=0).tolist() for figure, values in by_chain.items()}
        background = by_chain["background_error"]
        drift[name]["background_error_growth"] = (background[:, -1] - background[:, 0]).tolist()
    return drift


def plot_drift(drift: dict, path: Path) -> None:
    titles = {
        "background_error": "background error (share of the range)",
        "scene_right": "chains in the right scene",
        "sprite_right": "chains with the right sprite",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(13, 3.6))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for label, figures in drift.items():
            axis.plot(range(1, len(figures[name]) + 1), figures[name], label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("clip, or round trip of the VAE")
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    args = parse_args()
    started = time.time()
    pipe = SVIPipeline.from_pretrained(args.model_dir)
    pipe.set_progress_bar_config(disable=True)
    results = {
        **provenance(),
        "vae": measure_vae(pipe, args),
        "first_clip": measure_first_clips(pipe, args),
        "drift": measure_drift(pipe, args),
    }
    trips, chained = (results["drift"][name]["background_error_growth"] for name in ("VAE alone", "re-encoded"))
    results["gates"] = {
        # Growth of the background error over the round trips of the VAE, and over as many clips re-encoded.
        "vae_drift": np.mean(trips),
        "vae_drift_standard_error": standard_error(trips),
        "chain_drift": np.mean(chained),
        "chain_drift_standard_error": standard_error(chained),
        "last_latent_rms": results["first_clip"]["last_latent_rms"],
    }
    results["minutes"] = round((time.time() - started) / 60, 1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "svi_tiny.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_drift(results["drift"], args.output_dir / "drift.png")
    summary = {**results["vae"], **results["first_clip"], **results["gates"]}
    print("\n".join(f"{name:36} {value:.4g}" for name, value in summary.items() if isinstance(value, (int, float))))


if __name__ == "__main__":
    main()
