"""The options of the commands, in groups, and how `--help` shows them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..presets import DTYPES, GGUF, OFFLOADS, PRESETS, QUANTIZATIONS, SEED_STEP


# Longer ones have a line to themselves in `--help`.
WIDEST = 30
PATH = click.Path(path_type=Path)


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading `group`."""

    def __init__(self, *args: Any, group: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group = group


_SAME = ("model", "lora", "device", "dtype", "offload", "vae_tiling", "attention_backend", "quantize")
# Options of MODEL and MACHINE that are arguments of `load_pipeline`, and which.
LOADING = {
    **{name: name for name in _SAME},
    "lora_weight_name": "weight_name",
    "lora_weight_name_2": "weight_name_2",
}


def loading_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `load_pipeline` out of `options`. Raises a `ValueError` for what no model can be loaded with."""
    from ..loading import check_loading

    loading = {argument: options[name] for name, argument in LOADING.items()}
    check_loading(**{name: value for name, value in loading.items() if name not in ("model", "device", "vae_tiling")})
    return loading


class GroupedCommand(click.Command):
    """A command whose `--help` shows options under their headings, and examples as they were written."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Other"), []).append(record)
        # One column of names for all of them.
        names = [name for records in groups.values() for name, _ in records if len(name) <= WIDEST]
        width = max(map(len, names), default=0)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), told) for name, told in records])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


def option(group: str, *names: str, **settings: Any) -> Callable[..., Any]:
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def with_options(*groups: list[Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that adds the options of `groups` in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed([one for group in groups for one in group]):
            command = one(command)
        return command

    return add


START = [
    option("What is made", "--out", type=PATH, help="The film, an MP4 or MKV file that grows."),
    option("What is made", "--image", help="Its start image: file or address. Not needed to go on."),
    option("What is made", "--continue_from", type=PATH, help="A video that it begins with and goes on from."),
    option("What is made", "--recipe", type=PATH, help="A film to make once more, as its file tells."),
    option("What is made", "--jobs", type=PATH, help="Many films: a line each, a JSON object of these options."),
]
CLIPS = [
    option("What is made", "--prompt", "prompt_list", multiple=True, help="What happens in a clip; once for each."),
    option("What is made", "--prompts", "prompt_file", help="File of prompts; - to type them while it is made."),
    option("What is made", "--num_clips", type=int, help="One a prompt if not given; after that the last holds."),
]
NEW_CLIPS = [
    *CLIPS[:-1],
    option("What is made", "--num_clips", type=int, help="Clips more; without prompts the last one holds."),
]
BASE = [
    option("Model", "--model", help="Another base model: Hub name or folder."),
]
MODEL = [
    option("Model", "--preset", type=click.Choice([*PRESETS]), default="film", show_default=True, help="SVI LoRA."),
    *BASE,
    option("Model", "--lora", help="Another LoRA: Hub name, folder or file; `none` for the plain chain."),
    option("Model", "--lora_weight_name", help="The file in it."),
    option("Model", "--lora_weight_name_2", help="The file for the low-noise expert of Wan 2.2 A14B."),
]
SIZE = [
    option("Settings", "--height", type=int, help="In pixels; from the image's aspect if not given."),
    option("Settings", "--width", type=int, help="In pixels; from the image's aspect if not given."),
    option("Settings", "--resize_mode", help="An image of another aspect: stretch (if not given), crop or pad."),
    option("Settings", "--num_frames", type=int, help="Frames of a clip, 1 + 4n; the preset's if not given."),
]
SETTINGS = [
    option("Settings", "--num_inference_steps", type=int, help="Steps of a clip; the preset's if not given."),
    option("Settings", "--guidance_scale", type=float, help="Weight of the prompt; the preset's if not given."),
    option("Settings", "--guidance_scale_2", type=float, help="That of the low-noise expert."),
    option("Settings", "--negative_prompt", help="What it should not show; the authors' if not given."),
    option("Settings", "--color_match", help="Keep the colours of the start image: none (if not given), mkl, ..."),
    option("Settings", "--max_sequence_length", type=int, help="Tokens of a prompt; as many as Wan takes."),
]
SEED = [
    option(
        "Settings", "--seed", type=int, default=0, show_default=True, help=f"Of clip 1; {SEED_STEP} more for each."
    ),
]
FILE = [
    option("File", "--fps", type=float, help="Frames a second; the preset's if not given."),
    option("File", "--codec", help="libx264 (if not given), which all play, libx265, libsvtav1; ffv1 in MKV."),
    option("File", "--crf", type=int, help="Of the codec: smaller is better and larger."),
    option("File", "--pixel_format", help="yuv420p (if not given), which all play, or yuv444p."),
]
WRITING = [
    option("File", "--background", is_flag=True, help="Encode a clip while the next one is made."),
    option("File", "--finalize", type=PATH, help="When it is done, write it here as an ordinary MP4."),
]
POSE = [
    option("What is made", "--pose", type=PATH, help="What a film of `dance` follows: video, folder, or keypoints."),
]
FOLLOWED = [
    *POSE,
    option("What is made", "--loop_pose", is_flag=True, help="Begin with the poses again where they end."),
]
SOUND = [
    option("File", "--audio", type=PATH, help="Its sound: a sound file, or a video; what a film of `talk` follows."),
]
ENCODER = [
    option("Model", "--audio_encoder", help="For `talk`, another wav2vec2: Hub name or folder."),
]
HEARING = [
    *ENCODER,
    option("Settings", "--audio_guidance_scale", type=float, help="Weight of the audio, with `talk`; 5 if not given."),
]
MACHINE = [
    option("Machine", "--device", help="Where it runs; the accelerator if there is one."),
    option("Machine", "--dtype", type=click.Choice(DTYPES), help="Of the model; float32 on a CPU, else bfloat16."),
    option(
        "Machine",
        "--offload",
        type=click.Choice(OFFLOADS),
        default="none",
        show_default=True,
        help="Keep on the device what is at work: a model, or a group of its layers.",
    ),
    option("Machine", "--vae_tiling", is_flag=True, help="Less memory; static backgrounds may collect artifacts."),
    option("Machine", "--attention_backend", help="Of diffusers' ways to compute attention: flash, sage, ..."),
    option(
        "Machine",
        "--quantize",
        type=click.Choice(QUANTIZATIONS),
        default="none",
        show_default=True,
        help="Smaller weights: quanto (8 bits, by optimum-quanto) or fp8 (kept in float8, transformers only).",
    ),
]
CARD = [
    option("Machine", "--gguf", type=click.Choice(GGUF), help="For `plan`: weights of a GGUF file of this kind."),
    option("Machine", "--card", type=float, multiple=True, help="GPU to fit, in GiB; 12, 24 and 80 if not given."),
    option("Machine", "--attention", type=click.Choice(("flash", "sage", "math")), default="flash", show_default=True),
]
TRAINING = [
    option("Training", "--train", is_flag=True, help="Plan a run of examples/train_erft.py instead of a film."),
    option("Training", "--zero", type=click.Choice(("0", "2", "3")), default="0", help="DeepSpeed's stage; 0: none."),
    option("Training", "--processes", type=click.IntRange(1), default=1, show_default=True, help="One a GPU."),
    option("Training", "--rank", type=click.IntRange(1), default=128, show_default=True, help="Of the LoRA."),
    option(
        "Training",
        "--train_batch_size",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Samples a process.",
    ),
    option("Training", "--buckets", help='Several sizes of clips: "832x480 480x832 624x624x49".'),
    option("Training", "--both_experts", is_flag=True, help="Of Wan 2.2 A14B, in turns: the trainer's --expert both."),
    option("Training", "--no_checkpointing", is_flag=True, help="Without gradient checkpointing."),
    option("Training", "--quantize_base", type=click.Choice(("8bit", "4bit", "int8", "fp8")), help="Of the base."),
    option("Training", "--group_offload", is_flag=True, help="Keep the blocks of the base on the CPU, but two."),
    option("Training", "--cached", is_flag=True, help="The cache is full: no encoder is loaded."),
    option("Training", "--bank_dtype", type=click.Choice(("float32", "bfloat16", "int8")), default="bfloat16"),
    option(
        "Training", "--bank_capacity", type=click.IntRange(1), default=500, show_default=True, help="Errors a grid."
    ),
]
DRY_RUN = [
    option("Other", "--dry_run", is_flag=True, help="Check everything, tell what would be made, and load no model."),
]
