"""`diffusers-svi correct`: whether a LoRA shrinks errors from clip to clip, told by single clips."""

from typing import Any

import click

from ..correction.kinds import KINDS, SIZES
from .options import DRY_RUN, MACHINE, MODEL, PATH, SEED, SETTINGS, SIZE, GroupedCommand, option, with_options


EXAMPLES = """
diffusers-svi correct --preset shot --image cat.png --image boat.png --prompt "it moves" --out_dir outputs/shot
diffusers-svi correct --lora my.safetensors --image a.png --image b.png --image c.png --prompt "it moves" \\
    --kind vae --kind exposure --size medium --num_inference_steps 10 --out_dir outputs/mine  (a few clips)

The same command again goes on where it was stopped; with more images, kinds or sizes it adds those.
"""
WHAT = [
    option("What is measured", "--out_dir", type=PATH, required=True, help="For correction.json and correction.png."),
    option(
        "What is measured", "--image", "images", multiple=True, help="The clip before stands still; once for each."
    ),
    option("What is measured", "--video", "videos", type=PATH, multiple=True, help="Its first frames are it."),
    option(
        "What is measured", "--stories", type=PATH, help="A folder for each, with frame.jpg and prompt.txt: its first."
    ),
    option("What is measured", "--prompt", "prompts", multiple=True, help="Of the clip made: one, or one for each."),
    option(
        "What is measured", "--kind", "kinds", type=click.Choice([*KINDS]), multiple=True, help="All if not given."
    ),
    option("What is measured", "--size", "sizes", type=click.Choice(SIZES), multiple=True, help="All if not given."),
    option("What is measured", "--fps", type=int, help="That videos are brought to; the preset's if not given."),
    option("What is measured", "--without_base", is_flag=True, help="The LoRA alone: half the clips, no comparison."),
    option("What is measured", "--without_plot", is_flag=True, help="Table and file alone: matplotlib is not needed."),
]


@click.command(cls=GroupedCommand, epilog=EXAMPLES)
@with_options(WHAT, MODEL, SIZE, SETTINGS, SEED, MACHINE, DRY_RUN)
def correct(**options: Any) -> None:
    """Tell whether a LoRA corrects: what one clip leaves of a known error on the clip before.

    Errors of known kind and size are put on what a clip goes on from. What of each is left when the clip ends, over
    what was put in, is its slope: below 1 errors shrink from clip to clip, above 1 they grow. The model is measured
    with the LoRA and without it, on the same noise. docs/correct.md tells how to read it.
    """
    from .correcting import run

    run(options)
