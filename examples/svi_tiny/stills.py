"""Images that films of the world begin with, and a prompt for each, to be chained from.

    PYTHONPATH=examples python -m svi_tiny.stills --output_dir outputs/stills --num_images 16

Writes `000.png`, `001.png`, ... and `prompts.txt`, a line for each.
"""

import argparse
import os
from pathlib import Path

import PIL.Image

from .world import caption, render, sample_story


def write_stills(folder: str | os.PathLike, num_images: int, seed: int = 1) -> list[str]:
    """Write `num_images` images of `(SIZE, SIZE)` pixels and their prompts into `folder`, and return the prompts.

    Args:
        folder: Where to; it is made if need be.
        num_images (`int`): How many.
        seed (`int`, defaults to 1): Image `index` is the first of `sample_story(seed, index)`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for index in range(num_images):
        state, (action,) = sample_story(seed, index)
        PIL.Image.fromarray(render(state)).save(folder / f"{index:03d}.png")
        prompts.append(caption(state, action))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to.")
    parser.add_argument("--num_images", type=int, default=16, help="Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=1, help="Of the films; svi-tiny saw 0. Default: %(default)s.")
    args = parser.parse_args()
    write_stills(args.output_dir, args.num_images, args.seed)
    print(f"{args.num_images} images in {args.output_dir}.")


if __name__ == "__main__":
    main()
