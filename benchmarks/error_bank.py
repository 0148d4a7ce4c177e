r"""Measure what a full error bank's L2 replacement costs, and whether it replaces the right error.

    python benchmarks/error_bank.py --json --output_file docs/results/error_bank/synthetic.json

One grid of the bank is filled, and a stream of new errors goes into it with `ErrorBank.put`. Every victim is compared
with that of an exact float32 search over the same stored values: `victim_agreement` is the share that are the same.
Some of the replacements, spread over the run, are also done the published way right before `put`: all stored errors
are stacked, the new one is subtracted, the norms are taken, and the entry of the list with the smallest is set. What
is stacked is what is stored, in its own dtype (bfloat16 beside an int8 bank, which the published code does not have),
and all of it stays in that dtype, as there. `eviction_speedup` is the ratio of the two medians.

Where the errors come from. A grid begins with five errors of each of `capacity / 5` videos. Of the new ones, every
other is another error of a video that has been seen, so a near relative of some that are stored; the rest are the
first of videos never seen.

- By default the errors are synthetic. Visit k of video v is

      e = g_v (sqrt(0.1) sum_j s_j B_j + sqrt(0.6) L_v + sqrt(0.3) N)

  with 8 fields B_j that all errors share and a field L_v of the video, both smooth (normal values every 4 latent
  frames and 8 pixels, linear between them), normal noise N and s_j (of variance 1/8) that are new at every visit, and
  g_v = exp(0.25 n), n normal. The residuals of svi-tiny have more of their variance in L_v (0.68 to 0.89) and differ
  more in strength (0.27 to 0.38).
- With `--model_dir` they are composed of residuals r = v_hat - V of that model on videos of svi-tiny's world, at noise
  levels of one grid of 50 (the middle one), 8 draws of noise a video. One residual is much smaller than an error of
  real size, (48, 5, 8, 8) instead of (16, 21, 60, 104), so an error is tiled with blocks of them: a residual is cut
  into three blocks of 16 channels, tile p takes block p mod 3 of a draw chosen at random, and all tiles of an error
  are of the same video, so that strength and mean of an error are those of real ones, and do not average out.
"""

import argparse
import itertools
import math
import statistics
import time

import torch
import torch.nn.functional as F
from contestants import HELD_OUT_SEED, world
from report import add_report_options, provenance, report
from tqdm.auto import tqdm

from diffusers_svi import PixelMotion, SVIPipeline
from diffusers_svi.conditioning import Carried
from diffusers_svi.erft import BankConfig, ErrorBank
from diffusers_svi.erft.storage import DTYPES, FLOAT_DTYPES, make_storage
from diffusers_svi.flow import interpolate, shifted_sigmas, velocity
from diffusers_svi.pixels import from_uint8
from diffusers_svi.wan import encode_video, transformer_inputs


FULL = {"shape": [16, 21, 60, 104], "capacity": 500, "num_replacements": 200, "num_published": 7}
QUICK = {"shape": [16, 3, 12, 12], "capacity": 10, "num_replacements": 8, "num_published": 3}
VISITS = 5
DRAWS = 8
NUM_GRIDS, GRID = 50, 25
FLOW_SHIFT = 5.0
FIRST_STORY = 50000


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=int, nargs=4, help="Of one error: channels, latent frames, height, width. Default: 480p.")
    add("--capacity", type=int, help="Errors in the grid. Default: 500.")
    add("--num_replacements", type=int, help="New errors, of which the victims are compared. Default: 200.")
    add("--num_published", type=int, help="Of these, so many are also replaced the published way. Default: 7.")
    add("--dtype", choices=DTYPES, default="bfloat16", help="The bank keeps errors in. Default: %(default)s.")
    add("--model_dir", help="A model of svi-tiny's kind, of whose residuals the errors are composed.")
    add("--seed", type=int, default=0, help="Default: %(default)s.")
    add_report_options(parser)
    add("--quick", action="store_true", help="Defaults for a test: small errors, few of them, seconds.")
    args = parser.parse_args()
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not 1 <= args.num_published <= args.num_replacements:
        parser.error(f"--num_published must be within 1 and --num_replacements, got {args.num_published}.")
    if args.capacity < 1 or min(args.shape) < 1:
        parser.error("--capacity and all of --shape must be at least 1.")
    return args


# Errors


def smooth_field(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Normal values on a coarse lattice, linear between them, of unit root mean square."""
    channels, frames, height, width = shape
    lattice = (channels, math.ceil(frames / 4) + 1, math.ceil(height / 8) + 1, math.ceil(width / 8) + 1)
    values = torch.randn(1, *lattice, generator=generator)
    field = F.interpolate(values, shape[1:], mode="trilinear", align_corners=True)[0]
    return field / field.square().mean().sqrt()


class SyntheticErrors:
    """The family of the module's docstring."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self.seed = shape, seed
        generator = torch.Generator().manual_seed(seed)
        self.shared = torch.stack([smooth_field(shape, generator) for _ in range(8)])

    def of(self, video: int, generator: torch.Generator) -> torch.Tensor:
        own = torch.Generator().manual_seed(10**6 * (self.seed + 1) + video)
        strength = math.exp(0.25 * float(torch.randn((), generator=own)))
        error = smooth_field(self.shape, own).mul_(math.sqrt(0.6))
        shares = torch.randn(8, generator=generator) * math.sqrt(0.1 / 8)
        error += torch.tensordot(shares, self.shared, dims=1)
        error += torch.randn(self.shape, generator=generator).mul_(math.sqrt(0.3))
        return error.mul_(strength)


class ModelErrors:
    """Errors tiled with residuals of a model, as in the module's docstring."""

    def __init__(self, model_dir: str, shape: tuple[int, ...], seed: int, num_videos: int):
        pipe = SVIPipeline.from_pretrained(model_dir)
        generator = torch.Generator().manual_seed(seed)
        videos = tqdm(range(num_videos), desc="Residuals")
        residuals = torch.stack([self._residuals(pipe, index, generator) for index in videos])
        channels, *size = shape
        if residuals.shape[2] % channels:
            raise ValueError(
                f"`--shape` must have channels that divide the model's {residuals.shape[2]}, got {channels}."
            )
        self.shape = shape
        # (videos, draws, blocks, channels, frames, height, width)
        self.blocks = residuals.unflatten(2, (-1, channels))
        self.tiles = [math.ceil(length / block) for length, block in zip(size, residuals.shape[3:], strict=True)]

    @staticmethod
    @torch.no_grad()
    def _residuals(pipe: SVIPipeline, index: int, generator: torch.Generator) -> torch.Tensor:
        """`(DRAWS, z_dim, latent_frames, h, w)`."""
        state, (action,) = world.sample_story(HELD_OUT_SEED, FIRST_STORY + index)
        clip = torch.from_numpy(world.render(world.film(state, [action]))[None])
        pixels = from_uint8(clip.permute(0, 4, 1, 2, 3))
        clean = encode_video(pipe.vae, pixels).expand(DRAWS, -1, -1, -1, -1)
        condition = PixelMotion().condition(
            pipe.vae, Carried(pixels[:, :, 0]), world.CLIP_FRAMES, expand_timesteps=False
        )
        prompt, _ = pipe.encode_prompt(
            world.caption(state, action), do_classifier_free_guidance=False, max_sequence_length=32
        )
        grid_sigmas = shifted_sigmas(NUM_GRIDS, FLOW_SHIFT)
        high, low = ((grid_sigmas[GRID] + grid_sigmas[GRID + step]) / 2 for step in (-1, 1))
        sigmas = (low + (high - low) * torch.rand(DRAWS, generator=generator, dtype=torch.float64)).float()
        noise = torch.randn(clean.shape, generator=generator)
        inputs = transformer_inputs(
            interpolate(clean, noise, sigmas),
            condition.expand_as(clean),
            sigmas,
            pipe.transformer.config.patch_size,
            expand_timesteps=False,
        )
        prediction = pipe.transformer(*inputs, prompt.expand(DRAWS, -1, -1), return_dict=False)[0]
        return prediction - velocity(clean, noise)

    def of(self, video: int, generator: torch.Generator) -> torch.Tensor:
        blocks = self.blocks[video]
        draws = torch.randint(len(blocks), (math.prod(self.tiles),), generator=generator).tolist()
        error = torch.empty(self.shape)
        size = blocks.shape[3:]
        for tile, place in enumerate(itertools.product(*map(range, self.tiles))):
            corner = error[(slice(None), *(slice(n * i, n * (i + 1)) for n, i in zip(size, place, strict=True)))]
            block = blocks[draws[tile], tile % blocks.shape[1]]
            corner.copy_(block[(slice(None), *map(slice, corner.shape[1:]))])
        return error


# Replacement


def exact_search(bank: ErrorBank, error: torch.Tensor) -> tuple[int, float]:
    """The place of the nearest stored error, and its distance: all of them are compared in full, in float32."""
    distances = [float(torch.dist(bank.get(0, place).residual, error)) for place in range(bank.config.capacity)]
    smallest = min(distances)
    return distances.index(smallest), smallest


def replace_as_published(entries: list[torch.Tensor], error: torch.Tensor) -> int:
    """The published L2 replacement, on a list of tensors in memory."""
    # source: _add_error_to_latent_buffer with "l2_batch", in train_svi.py of the authors' repository
    stacked = torch.stack(entries).flatten(start_dim=1)
    distances = torch.norm(stacked - error.flatten().unsqueeze(0), p=2, dim=1)
    place = int(distances.argmin())
    entries[place] = error
    return place


def reconstruction_errors(errors: list[torch.Tensor]) -> dict[str, float]:
    """Root mean square error of every form of storage, relative to that of the errors."""
    result = {}
    for dtype in DTYPES:
        storage = make_storage(1, errors[0].numel(), dtype)
        squares = total = 0.0
        for error in errors:
            storage.write(0, error.flatten())
            squares += float((storage.read(0) - error.flatten()).square().sum())
            total += float(error.square().sum())
        result[dtype] = math.sqrt(squares / total)
    return result


def share(truths: list[bool]) -> float:
    return sum(truths) / len(truths)


def timed(function, *arguments) -> tuple[float, int]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main():
    args = parse_args()
    results, started = provenance(), time.time()
    shape, capacity = tuple(args.shape), args.capacity
    num_seen = math.ceil(capacity / VISITS)
    if args.model_dir is None:
        family = SyntheticErrors(shape, args.seed)
    else:
        family = ModelErrors(args.model_dir, shape, args.seed, num_seen + args.num_replacements // 2)
    config = BankConfig(num_grids=1, capacity=capacity, dtype=args.dtype)
    sigma = float(shifted_sigmas(NUM_GRIDS, FLOW_SHIFT)[GRID])
    bank = ErrorBank(shape, torch.tensor([sigma]), config)
    generator = torch.Generator().manual_seed(args.seed)
    for place in tqdm(range(capacity), desc="Filling the grid"):
        bank.put(0, family.of(place % num_seen, generator), sigma, generator)

    list_dtype = FLOAT_DTYPES.get(args.dtype, torch.bfloat16)
    if args.dtype in FLOAT_DTYPES:
        # Views: every write to the bank is one to the list, and nothing is kept twice.
        entries = list(bank.storage.tensors["values"].unflatten(1, shape))
    else:
        entries = [bank.get(0, place).residual.to(list_dtype) for place in range(capacity)]

    published_at = {index * args.num_replacements // args.num_published for index in range(args.num_published)}
    put_seconds, published_seconds, published_agreed = [], [], []
    agreed, distances = {"relative": [], "new_video": []}, {"relative": [], "new_video": []}
    samples = []
    for index in tqdm(range(args.num_replacements), desc="Replacing"):
        kind = ("relative", "new_video")[index % 2]
        video = num_seen if kind == "new_video" else int(torch.randint(num_seen, (), generator=generator))
        num_seen = max(num_seen, video + 1)
        error = family.of(video, generator)
        samples = [*samples, error][:8]
        exact, distance = exact_search(bank, error)
        if index in published_at:
            seconds, place = timed(replace_as_published, entries[:], error.to(list_dtype))
            published_seconds.append(seconds)
            published_agreed.append(place == exact)
        seconds, place = timed(bank.put, 0, error, sigma, generator)
        put_seconds.append(seconds)
        agreed[kind].append(place == exact)
        distances[kind].append(distance / float(error.norm()))
        if args.dtype not in FLOAT_DTYPES:
            entries[place] = bank.get(0, place).residual.to(list_dtype)

    put, published = statistics.median(put_seconds), statistics.median(published_seconds)
    results.update(
        {
            "errors": "synthetic" if args.model_dir is None else f"residuals of {args.model_dir}",
            "error_shape": shape,
            "capacity": capacity,
            "dtype": args.dtype,
            "replacements": args.num_replacements,
            "published_replacements": args.num_published,
            "eviction_speedup": published / put,
            "victim_agreement": share([*itertools.chain(*agreed.values())]),
            "median_seconds": {"put": put, "published": published},
            "seconds_range": {
                "put": [min(put_seconds), max(put_seconds)],
                "published": [min(published_seconds), max(published_seconds)],
            },
            "victim_agreement_of": {kind: share(values) for kind, values in agreed.items() if values},
            "published_victim_agreement": share(published_agreed),
            # Relative to the norm of the new error.
            "median_nearest_distance": {kind: statistics.median(v) for kind, v in distances.items() if v},
            "reconstruction_error": reconstruction_errors(samples),
            "minutes": round((time.time() - started) / 60, 1),
        }
    )
    report(results, args)


if __name__ == "__main__":
    main()
