r"""Measure what error recycling adds to a training step: the time of an ERFT step over that of a plain LoRA step.

    python benchmarks/erft_step.py --json --output_file docs/results/erft_step/erft_step.json
    python benchmarks/erft_step.py --preset 14b --json          # on a GPU with 80 GB

Both steps train the same LoRA on the same frozen image-to-video transformer of Wan's form, on the same random latents.
They take turns, and which is first changes every time. Weights are random: the time does not depend on them. A plain
step interpolates, predicts, takes the weighted loss of the velocity, and steps AdamW, with gradient checkpointing. An
ERFT step has `ErrorRecycler.inject` before that and `ErrorRecycler.recycle` after it. Every grid of the bank is full,
so every recycled error replaces one by L2. No sample is clean, and noise takes errors much more often than in any
published recipe: p_clean 0, p_vid 0.9, p_img 0.9, p_noi 0.5.

`step_ratio` is the ratio of the median times. The bank is in the machine's memory, never the GPU's. Its capacity is
that of the published recipe, 500 errors a grid, or what fits half of the free memory, if that is less.

There are presets. "14b" is a transformer of true size beside a bank of errors of true size, clips of 81 frames at
480p; it is the default if there is a GPU. "cpu", the default if there is none, is a model small enough for two cores,
on latents of 5 x 32 x 32, with a bank of 4.5 GB.
"""

import argparse
import math
import statistics
import time
from contextlib import nullcontext

import psutil
import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from report import add_report_options, provenance, report
from tqdm.auto import tqdm

from diffusers_svi.erft import (
    BankConfig,
    ErrorBank,
    ErrorRecycler,
    InjectionConfig,
    RecyclerConfig,
    erft_loss,
    loss_weights,
    recycled_velocity,
)
from diffusers_svi.flow import interpolate, shifted_sigmas
from diffusers_svi.lora_file import TARGET_MODULES
from diffusers_svi.wan import transformer_inputs


PRESETS = {
    "cpu": {
        "latent_shape": [16, 5, 32, 32],
        "num_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 2048,
        "text_dim": 4096,
        "rank": 32,
        "num_grids": 50,
        "capacity": 500,
        "steps": 12,
        "warmup_steps": 2,
        "dtype": "float32",
    },
    "14b": {
        "latent_shape": [16, 21, 60, 104],
        "num_layers": 40,
        "num_attention_heads": 40,
        "ffn_dim": 13824,
        "text_dim": 4096,
        "rank": 128,
        "num_grids": 50,
        "capacity": 500,
        "steps": 3,
        "warmup_steps": 1,
        "dtype": "bfloat16",
    },
    "quick": {
        "latent_shape": [16, 3, 8, 8],
        "num_layers": 1,
        "num_attention_heads": 1,
        "ffn_dim": 64,
        "text_dim": 16,
        "rank": 4,
        "num_grids": 5,
        "capacity": 4,
        "steps": 2,
        "warmup_steps": 1,
        "dtype": "float32",
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLOW_SHIFT = 5.0
TRAIN_TIMESTEPS = 1000
PROMPT_TOKENS = 512
INJECTION = InjectionConfig(p_clean=0.0, p_vid=0.9, p_img=0.9, p_noi=0.5)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="Sets all of the following that are not given.")
    add("--quick", action="store_const", dest="preset", const="quick", help="For a test: a tiny model, seconds.")
    add("--latent_shape", type=int, nargs=4, help="Channels, latent frames, height, width; the last two are even.")
    add("--num_layers", type=int)
    add("--num_attention_heads", type=int, help="Of 128 channels each, as in Wan.")
    add("--ffn_dim", type=int)
    add("--text_dim", type=int, help="Of the 512 embedded tokens of the prompt.")
    add("--rank", type=int, help="Of the LoRA.")
    add("--num_grids", type=int, help="Grids of the bank.")
    add("--capacity", type=int, help="Errors of a grid at most; fewer if they take over half of the free memory.")
    add("--steps", type=int, help="Steps of either kind that are measured.")
    add("--warmup_steps", type=int, help="Steps of either kind before those.")
    add("--dtype", choices=DTYPES, help="Of the frozen weights and of the computation. The LoRA is in float32.")
    add("--bank_dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16", help="Default: %(default)s.")
    add("--device", help="Default: cuda if there is one, else cpu.")
    add("--seed", type=int, default=0, help="Default: %(default)s.")
    add_report_options(parser)
    args = parser.parse_args()
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.preset is None:
        args.preset = "14b" if args.device.startswith("cuda") else "cpu"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.steps < 1 or args.warmup_steps < 0:
        parser.error("--steps must be at least 1, and --warmup_steps at least 0.")
    if args.latent_shape[2] % 2 or args.latent_shape[3] % 2:
        parser.error(f"height and width of --latent_shape must be even, got {args.latent_shape}.")
    return args


def build_transformer(args: argparse.Namespace) -> WanTransformer3DModel:
    """Wan 2.2 A14B's layout (2.1 has image tokens too), random, frozen, with a float32 LoRA on it."""
    channels = args.latent_shape[0]
    # Made where and as it is used: 14B parameters in float32 would not fit everywhere.
    torch.set_default_dtype(DTYPES[args.dtype])
    with torch.device(args.device):
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=args.num_attention_heads,
            attention_head_dim=128,
            in_channels=2 * channels + 4,
            out_channels=channels,
            text_dim=args.text_dim,
            ffn_dim=args.ffn_dim,
            num_layers=args.num_layers,
        )
    torch.set_default_dtype(torch.float32)
    transformer.requires_grad_(False)
    transformer.enable_gradient_checkpointing()
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGET_MODULES))
    cast_training_params(transformer, dtype=torch.float32)
    return transformer.train()


def build_recycler(args: argparse.Namespace) -> ErrorRecycler:
    """With a bank in which every place of every grid is taken."""
    config = BankConfig(
        num_grids=args.num_grids,
        capacity=args.capacity,
        dtype=args.bank_dtype,
        byte_budget=psutil.virtual_memory().available // 2,
    )
    bank = ErrorBank(tuple(args.latent_shape), shifted_sigmas(args.num_grids, FLOW_SHIFT), config)
    generator = torch.Generator().manual_seed(args.seed)
    # A handful in all places: what they are makes no difference to the time.
    residuals = 0.3 * torch.randn(8, *args.latent_shape, generator=generator)
    for slot in tqdm(range(args.num_grids * bank.config.capacity), desc="Filling the bank"):
        grid = slot % args.num_grids
        bank.put(grid, residuals[slot // args.num_grids % len(residuals)], float(bank.grid_sigmas[grid]), generator)
    return ErrorRecycler(bank, INJECTION, RecyclerConfig(), args.seed)


class Trainer:
    """A training step of either kind, with the times of its parts."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.dtype = torch.device(args.device), DTYPES[args.dtype]
        torch.manual_seed(args.seed)
        self.transformer = build_transformer(args)
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.sigmas, self.weights = shifted_sigmas(TRAIN_TIMESTEPS, FLOW_SHIFT), loss_weights()
        self.generator = torch.Generator().manual_seed(args.seed)
        self.latents, self.condition = (self._normal(1, *args.latent_shape) for _ in range(2))
        self.prompt = self._normal(1, PROMPT_TOKENS, args.text_dim).to(self.dtype)
        self.autocast = (
            nullcontext() if self.dtype is torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
        )

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self, recycler: ErrorRecycler | None) -> dict[str, float]:
        """Seconds of a plain step, or of one that recycles errors: "total", and then "inject" and "recycle"."""
        noise = self._normal(*self.latents.shape)
        pick = torch.randint(TRAIN_TIMESTEPS, (1,), generator=self.generator)
        sigmas, weights = (values[pick].float().to(self.device) for values in (self.sigmas, self.weights))
        latents, condition, seconds = self.latents, self.condition, {}
        start = self._clock()
        if recycler is not None:
            injected = recycler.inject(latents, noise, condition, sigmas)
            latents, noise, condition = injected.latents, injected.noise, injected.condition
            seconds["inject"] = self._clock() - start
        noisy = interpolate(latents, noise, sigmas)
        hidden_states, timesteps = transformer_inputs(noisy, condition, sigmas, (1, 2, 2), expand_timesteps=False)
        with self.autocast:
            prediction = self.transformer(hidden_states.to(self.dtype), timesteps, self.prompt, return_dict=False)[0]
        prediction = prediction.float()
        target = recycled_velocity(self.latents, noise)
        erft_loss(prediction, target, weights).mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if recycler is not None:
            before = self._clock()
            recycler.recycle(prediction.detach() - target, sigmas, injected.switches)
            seconds["recycle"] = self._clock() - before
        seconds["total"] = self._clock() - start
        return seconds


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main():
    args = parse_args()
    results, started = provenance(), time.time()
    trainer, recycler = Trainer(args), build_recycler(args)
    plain, erft = [], []
    for index in tqdm(range(args.warmup_steps + args.steps), desc="Pairs of steps"):
        # In turn first: whatever the step before leaves behind falls on either kind alike.
        for recycles in (False, True) if index % 2 == 0 else (True, False):
            (erft if recycles else plain).append(trainer.step(recycler if recycles else None))
    plain, erft = plain[args.warmup_steps :], erft[args.warmup_steps :]
    totals = [statistics.median(step["total"] for step in steps) for steps in (plain, erft)]
    size, bank = math.prod(args.latent_shape), recycler.bank
    parameters = list(trainer.transformer.parameters())
    if trainer.device.type == "cuda":
        results["peak_device_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    results.update(
        {
            "preset": args.preset,
            "device": args.device,
            "dtype": args.dtype,
            "parameters": sum(p.numel() for p in parameters if not p.requires_grad),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "latent_shape": args.latent_shape,
            "tokens": size // args.latent_shape[0] // 4,
            "bank": {
                "num_grids": args.num_grids,
                "capacity": bank.config.capacity,
                "dtype": args.bank_dtype,
                "bytes": bank.config.num_bytes(bank.error_shape),
                "full": bool((bank.counts == bank.config.capacity).all()),
            },
            "steps": args.steps,
            "step_ratio": totals[1] / totals[0],
            "median_seconds": {"plain": totals[0], "erft": totals[1]},
            "plain_seconds": summary([step["total"] for step in plain]),
            "erft_seconds": {name: summary([step[name] for step in erft]) for name in ("total", "inject", "recycle")},
            "recycling_share": statistics.median((step["inject"] + step["recycle"]) / step["total"] for step in erft),
            "minutes": round((time.time() - started) / 60, 1),
        }
    )
    report(results, args)


if __name__ == "__main__":
    main()
