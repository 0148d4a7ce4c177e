"""What a fused LoRA costs at inference: nothing, which is measured here.

    python benchmarks/fused_lora.py --lora examples/svi_tiny/loras/shot.safetensors

Clips are made in turn by the base model and by the model with the LoRA fused, both chained by the LoRA's scheme, with
the same start image, prompt and noise; `clip_ratio` is the ratio of the medians of their times.
"""

import argparse
import statistics
import time

import PIL.Image
from contestants import HELD_OUT_SEED, SVI_TINY, WORLD_OPTIONS, load_fused, lora_scheme, world
from report import add_report_options, provenance, report
from tqdm.auto import tqdm


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", required=True, help="File, with the scheme in the metadata.")
    parser.add_argument("--num_clips", type=int, default=40, help="Clips of each. Default: %(default)s.")
    parser.add_argument(
        "--num_inference_steps", type=int, default=WORLD_OPTIONS["num_inference_steps"], help="Default: %(default)s."
    )
    parser.add_argument("--quick", action="store_true", help="2 clips of 1 step, for a test.")
    add_report_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.num_clips, args.num_inference_steps = 2, 1
    return args


def main():
    args = parse_args()
    scheme = lora_scheme(args.lora)
    pipes = {"base": load_fused(SVI_TINY, None), "fused": load_fused(SVI_TINY, args.lora)}
    state, actions = world.sample_story(HELD_OUT_SEED, 0, 1, "consistent")
    chains = {
        name: pipe.stream(
            image=PIL.Image.fromarray(world.render(state)),
            prompts=world.caption(state, actions[0]),
            num_clips=args.num_clips + 1,
            conditioning=scheme,
            max_sequence_length=32,
            seeds=list(range(args.num_clips + 1)),
            **{**WORLD_OPTIONS, "num_inference_steps": args.num_inference_steps},
        )
        for name, pipe in pipes.items()
    }
    seconds = {name: [] for name in chains}
    for clip in tqdm(range(args.num_clips + 1), desc="Clips in turn"):
        for name, chain in chains.items():
            started = time.perf_counter()
            next(chain)
            if clip > 0:  # the first clip has another condition, and warms up
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report(
        {
            **provenance(),
            "scheme": str(scheme),
            "num_clips": args.num_clips,
            "clip_ratio": medians["fused"] / medians["base"],
            "median_seconds": medians,
            "seconds_range": {name: [min(values), max(values)] for name, values in seconds.items()},
        },
        args,
    )


if __name__ == "__main__":
    main()
