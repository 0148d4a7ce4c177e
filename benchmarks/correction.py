"""What a model makes of a condition with an error in it: does the error shrink on its way through a clip, or grow?

    python benchmarks/correction.py --lora control=control.safetensors erft=erft.safetensors

A chain drifts if what comes out of a clip is worse than what went in. Here that is measured for one clip, with errors
of known kind and size on its condition, before any chain is run; it takes a minute or two for every contestant.

- clean: no error.
- vae 1, 3, 10: the clip before took so many round trips through the VAE.
- light: the clip before is 5% darker.
- clip: the clip before was made by the contestant itself from a clean condition, as in a chain.
- step 0.3, 0.7, 0.95: one-step errors of the contestant at these noise levels, as the error bank holds them, on the
  first latent frame that is carried.

*In* is the root mean square of the error on the condition, in units of the latents' standard deviation, in the latent
frame in which it is largest; *out* is that of the condition which the end of the clip makes for the next one, against
the one that the true end makes. Writes `correction.json` and a plot.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from contestants import HELD_OUT_SEED, add_contestant_options, contestants, world
from report import provenance, write_json
from tqdm.auto import tqdm

from diffusers_svi import ChainState, LatentMotion, PixelMotion, SVIEulerScheduler, SVIPipeline
from diffusers_svi.conditioning import Carried, Scheme
from diffusers_svi.erft import InjectionConfig, clean_side_error
from diffusers_svi.erft.injection import add_to_condition
from diffusers_svi.flow import interpolate, velocity
from diffusers_svi.pixels import from_uint8
from diffusers_svi.wan import decode_video, encode_video, transformer_inputs


matplotlib.use("Agg")
import matplotlib.pyplot as plt


FIRST_STORY = 60000
ROUND_TRIPS = (1, 3, 10)
STEP_SIGMAS = (0.3, 0.7, 0.95)
PLAIN = {"base": PixelMotion(1), "reference": PixelMotion(1, padding="reference"), "anchor": LatentMotion(1)}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_contestant_options(parser, PLAIN)
    parser.add_argument("--num_samples", type=int, default=16, help="Held-out films. Default: %(default)s.")
    parser.add_argument(
        "--setting",
        choices=("consistent", "creative"),
        default="creative",
        help="Whether the prompts of their two clips are the same or differ. Default: %(default)s.",
    )
    parser.add_argument("--num_inference_steps", type=int, default=10, help="Default: %(default)s.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/correction"), help="Default: %(default)s.")
    parser.add_argument("--quick", action="store_true", help="1 film and 2 steps, for a test.")
    args = parser.parse_args()
    if args.quick:
        args.num_samples, args.num_inference_steps = 1, 2
    return args


def size(error: torch.Tensor) -> float:
    """Root mean square of errors `(batch, z_dim, n, h, w)` in the latent frame in which it is largest."""
    return error.square().mean(dim=(0, 1, 3, 4)).max().sqrt().item()


class Films:
    """Held-out films of two clips for a contestant: pixels, true conditions, prompts."""

    def __init__(self, pipe: SVIPipeline, scheme: Scheme, args: argparse.Namespace):
        self.pipe, self.scheme = pipe, scheme
        self.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config)
        self.num_steps, end = args.num_inference_steps, world.CLIP_FRAMES - 1
        stories = [
            world.sample_story(HELD_OUT_SEED, FIRST_STORY + i, 2, args.setting) for i in range(args.num_samples)
        ]
        films = [world.film(*story, [end, world.CLIP_FRAMES - scheme.overlap]) for story in stories]
        frames = torch.from_numpy(np.stack([world.render(film) for film in films])).permute(0, 4, 1, 2, 3)
        pixels = from_uint8(frames)
        self.before, self.clip = pixels[:, :, : world.CLIP_FRAMES], pixels[:, :, -world.CLIP_FRAMES :]
        self.begin = ChainState(scheme, world.CLIP_FRAMES, pixels[:, :, 0])
        told = list(zip(films, (actions for _, actions in stories), strict=True))
        self.embeds = [
            self._embed([world.caption(film[begin], actions[clip]) for film, actions in told])
            for clip, begin in enumerate((0, end))
        ]
        self.before_latents, self.clip_latents = (encode_video(pipe.vae, video) for video in (self.before, self.clip))
        self.noise = torch.randn((2, *self.before_latents.shape), generator=torch.Generator().manual_seed(0))
        self.start = self._condition(self.begin.carried())
        self.condition = self.end(self.before_latents, self.before)
        self.next = self.end(self.clip_latents, self.clip)

    def _embed(self, prompts: list[str]) -> torch.Tensor:
        # One by one, as the pipeline does it.
        return torch.cat([self.pipe.encode_prompt(p, None, False, max_sequence_length=32)[0] for p in prompts])

    def _condition(self, carried: Carried) -> torch.Tensor:
        return self.scheme.condition(self.pipe.vae, carried, world.CLIP_FRAMES, expand_timesteps=False)

    def end(self, latents: torch.Tensor, video: torch.Tensor | None = None) -> torch.Tensor:
        """The condition that the end of a clip makes for the next; `video` is the clip, if it is not to be decoded."""
        video = decode_video(self.pipe.vae, latents) if video is None else video
        return self._condition(self.begin.after(latents, video).carried())

    def predict(self, noisy: torch.Tensor, sigma: float, condition: torch.Tensor, clip: int) -> torch.Tensor:
        sigmas = torch.full((len(noisy),), sigma)
        patch_size = self.pipe.transformer.config.patch_size
        inputs = transformer_inputs(noisy, condition, sigmas, patch_size, expand_timesteps=False)
        return self.pipe.transformer(*inputs, self.embeds[clip], return_dict=False)[0]

    def make(self, condition: torch.Tensor, clip: int) -> torch.Tensor:
        """Latents of the first (0) or second (1) clip."""
        self.scheduler.set_timesteps(self.num_steps)
        latents = self.noise[clip]
        for timestep, sigma in zip(self.scheduler.timesteps, self.scheduler.sigmas.tolist(), strict=False):
            prediction = self.predict(latents, sigma, condition, clip)
            (latents,) = self.scheduler.step(prediction, timestep, latents, return_dict=False)
        return latents

    def step_error(self, sigma: float) -> torch.Tensor:
        """Clean-side errors of one step on the first clips, from their true conditions."""
        clean, noise = self.before_latents, self.noise[0]
        sigmas = torch.full((len(clean),), sigma)
        prediction = self.predict(interpolate(clean, noise, sigmas), sigma, self.start, 0)
        return clean_side_error(prediction - velocity(clean, noise), sigmas)

    def conditions(self) -> dict[str, torch.Tensor]:
        """True conditions of the second clip, with every kind of error."""
        result, latents = {"clean": self.condition}, self.before_latents
        for trip in range(1, max(ROUND_TRIPS) + 1):
            if trip in ROUND_TRIPS:
                result[f"vae {trip}"] = self.end(latents)
            latents = encode_video(self.pipe.vae, decode_video(self.pipe.vae, latents).clamp(-1, 1))
        dark = (self.before + 1) * 0.95 - 1
        result["light"] = self.end(encode_video(self.pipe.vae, dark), dark)
        result["clip"] = self.end(self.make(self.start, 0))
        first = 1 if self.scheme.carried_latents else 0
        injection = InjectionConfig(n_img=1, first_img=first)
        for sigma in STEP_SIGMAS:
            generator = torch.Generator().manual_seed(0)
            errors = self.step_error(sigma)
            result[f"step {sigma}"] = torch.stack(
                [
                    add_to_condition(condition, error, injection, generator)
                    for condition, error in zip(self.condition, errors, strict=True)
                ]
            )
        return result


@torch.no_grad()
def measure(pipe: SVIPipeline, scheme: Scheme, args: argparse.Namespace, name: str) -> dict[str, dict[str, float]]:
    films, figures = Films(pipe, scheme, args), {}
    for kind, condition in tqdm(films.conditions().items(), desc=name):
        latents = films.make(condition, 1)
        figures[kind] = {
            "in": size(condition - films.condition),
            "out": size(films.end(latents) - films.next),
            "last_latent": size((latents - films.clip_latents)[:, :, -1:]),
        }
    return figures


def plot(results: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, figures in results.items():
        axis.plot(figures.keys(), [figure["out"] for figure in figures.values()], "o-", label=name, linewidth=1)
    last = next(reversed(results.values()))
    axis.plot(last.keys(), [figure["in"] for figure in last.values()], "k_", markersize=14, label="in")
    axis.set_ylabel("error, standard deviations")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    args = parse_args()
    results = {
        name: {"scheme": str(scheme), "errors": measure(pipe, scheme, args, name)}
        for name, scheme, pipe in contestants(args, PLAIN)
    }
    figures = {**provenance(), "num_samples": args.num_samples, "setting": args.setting, "results": results}
    write_json(figures, args.output_dir / "correction.json")
    plot({name: result["errors"] for name, result in results.items()}, args.output_dir / "correction.png")
    for name, result in results.items():
        print(f"\n{name:14} {result['scheme']}\n{'':14}    in   out  last latent")
        for kind, figures in result["errors"].items():
            print(f"  {kind:12} {figures['in']:.3f} {figures['out']:.3f} {figures['last_latent']:.3f}")


if __name__ == "__main__":
    main()
