r"""Train an SVI LoRA for a Wan image-to-video model by error recycling (ERFT).

    accelerate launch examples/train_erft.py --preset shot \
        --pretrained_model_name_or_path Wan-AI/Wan2.1-I2V-14B-480P-Diffusers \
        --train_data_dir my_videos --output_dir my-svi-shot

The model's own one-step errors are banked by timestep and injected back into its inputs, and it learns the velocity
that leads to the clean latents. What comes out is a LoRA with its scheme in the metadata: `SVIPipeline` loads it and
chains clips the way it was trained for. A preset sets scheme, probabilities and data as published; every option given
beside it wins. See docs/training.md.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import AutoencoderKLWan, BitsAndBytesConfig, WanTransformer3DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import cast_training_params, free_memory
from diffusers.utils import export_to_video, load_image
from diffusers.utils.torch_utils import is_compiled_module
from huggingface_hub import ModelCard, ModelCardData, create_repo, snapshot_download, upload_folder
from peft import LoraConfig, convert_to_lora, prepare_model_for_kbit_training, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.integrations import unset_hf_deepspeed_config

from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.conditioning import Scheme, transformer_inputs
from diffusers_svi.data import (
    SampleLayout,
    Samples,
    TensorCache,
    Video,
    fingerprint,
    open_dataset,
    open_folder,
    usable_videos,
)
from diffusers_svi.erft import (
    BankConfig,
    ErrorBank,
    ErrorRecycler,
    InjectionConfig,
    RecyclerConfig,
    ShardedErrorBank,
    erft_loss,
    loss_weights,
    recycled_velocity,
)
from diffusers_svi.erft.bank import nearest_grid
from diffusers_svi.erft.boundary import denoise, next_condition
from diffusers_svi.erft.injection import Switches
from diffusers_svi.erft.snapshot import BankWriter, load_bank, save_bank
from diffusers_svi.flow import interpolate, shifted_sigmas
from diffusers_svi.latents import encode_video
from diffusers_svi.lora_file import TARGET_MODULES, read_lora, save_lora
from diffusers_svi.quality import drift_figures


logger = get_logger(__name__)

TRAIN_TIMESTEPS = 1000
LORA_NAME = "pytorch_lora_weights.safetensors"
ORIGINAL_LORA_NAME = "pytorch_lora_weights_original.safetensors"
UNFINISHED = ".unfinished"

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What a preset sets; an option given on the command line wins.
SHOT = {
    "conditioning": "pixel",
    "padding": "reference",
    "num_motion_frames": 1,
    "p_motion": 1.0,
    "p_vid": 0.9,
    "p_img": 0.9,
    "p_noi": 0.01,
    "p_clean": 0.2,
    "n_img": 3,
    "reference": "inside",
    "first_frame_augmentation": False,
}
FILM = {**SHOT, "padding": "zeros", "num_motion_frames": 5, "p_motion": 0.9, "p_clean": 0.5}
PRO = {**SHOT, "conditioning": "latent", "reference": "before", "n_img": 1}
PRESETS = {
    "shot": SHOT,
    "film": FILM,
    "film-2.0": {**FILM, "padding": "reference", "reference": "outside", "first_frame_augmentation": True},
    "pro": PRO,
    "ti2v-5b": {**PRO, "conditioning": "held", "p_motion": 0.8, "p_text_start": 0.1, "p_vid": 0.0, "p_noi": 0.0},
    "none": {**SHOT, "padding": "zeros", "p_vid": 0.0, "p_img": 0.0, "p_noi": 0.0, "p_clean": 1.0},
}
REPLACEMENT_ALIASES = {"l2_batch": "l2", "l2_similarity": "l2"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        required=True,
        help="Wan I2V model in diffusers' layout: Hub name or folder.",
    )
    add("--revision", help="Revision of the model on the Hub.")
    add("--cache_dir", help="Where downloads from the Hub are kept.")
    add(
        "--expert",
        choices=("high", "low"),
        help="Wan 2.2 A14B: which of the two experts to train. Timesteps are limited to its side of the boundary.",
    )
    add(
        "--quantize_base",
        choices=("4bit", "8bit"),
        help="Load the frozen base quantized by bitsandbytes (QLoRA). For long films use the LoRA on the full base.",
    )

    group = parser.add_argument_group("data, one of the three sources")
    add = group.add_argument
    add("--train_data_dir", help="Folder of videos with a CSV or JSONL file of captions, the authors' CSV included.")
    add("--dataset_name", help="Hugging Face dataset with a video column: Hub name or folder.")
    add("--world_videos", type=int, help="So many films of svi-tiny's procedural world.")
    add(
        "--world_setting",
        choices=("creative", "consistent"),
        default="creative",
        help="Whether their scenes and sprites change, or one motion goes on. Default: %(default)s.",
    )
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--video_column", help="Column of the videos; found by its name if not given.")
    add("--caption_column", help="Column of the captions; found by its name if not given.")
    add("--height", type=int, default=480, help="Of the clips, in pixels. Default: %(default)s.")
    add("--width", type=int, default=832, help="Of the clips, in pixels. Default: %(default)s.")
    add("--num_frames", type=int, default=81, help="Frames of a clip, 1 + 4n. Default: %(default)s.")
    add(
        "--samples_per_video",
        type=int,
        default=1,
        help="Samples that are cut from every video, each with a start, crop and reference of its own. Default: 1.",
    )
    add(
        "--max_skipped_share",
        type=float,
        default=0.1,
        help="Stop if a larger share of the videos is too short, unreadable or without caption. Default: %(default)s.",
    )
    add("--latent_cache_dir", help="Where latents and embeddings are kept. Default: <output_dir>/cache.")
    add("--proportion_empty_prompts", type=float, default=0.0, help="Share of samples trained without prompt.")
    add("--max_sequence_length", type=int, default=512, help="Tokens of a prompt. Default: %(default)s.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read the cache. Default: %(default)s.")

    group = parser.add_argument_group("scheme; the preset sets what is not given")
    add = group.add_argument
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="shot",
        help="shot: SVI-Shot. film: SVI-Film. film-2.0: SVI 2.0 on Wan 2.1. pro: SVI 2.0 Pro. ti2v-5b: held latents. "
        "none: no errors at all, plain LoRA tuning; the control. Default: %(default)s.",
    )
    add("--conditioning", choices=("pixel", "latent", "held"), help="PixelMotion, LatentMotion or HeldLatents.")
    add("--padding", choices=("zeros", "reference"), help="PixelMotion: what fills the rest of the condition.")
    add("--num_motion_frames", type=int, help="PixelMotion: frames carried from clip to clip.")
    add("--num_motion_latents", "--num_motion_latent", type=int, default=1, help="Latents carried. Default: 1.")
    add(
        "--p_motion",
        "--p_motion_threshold",
        type=float,
        help="Share of samples that go on from another clip; the others have the condition of a first clip.",
    )
    add("--p_text_start", type=float, help="HeldLatents: share of batches that hold nothing (text to video).")
    add(
        "--reference",
        choices=("inside", "outside", "before"),
        help="Where the reference frame is taken from: any frame of the clip, never one of it, or one before it.",
    )
    add("--first_frame_augmentation", action=argparse.BooleanOptionalAction, help="Jitter, blur and sharpen them.")

    group = parser.add_argument_group("error recycling; the preset sets what is not given")
    add = group.add_argument
    add("--p_vid", "--latent_prob", "--svi_p_vid", "--latent_inject_prob", type=float, help="Errors on the latents.")
    add("--p_img", "--y_prob", "--svi_p_img", "--context_inject_prob", type=float, help="Errors on the condition.")
    add("--p_noi", "--noise_prob", "--svi_p_noi", "--noise_inject_prob", type=float, help="Errors on the noise.")
    add("--p_clean", "--clean_prob", "--svi_p_clean", type=float, help="Share of samples without any error.")
    add("--n_img", "--y_error_num", type=int, help="Latent frames of the condition that take an error.")
    add(
        "--img_slots",
        choices=("motion", "all"),
        default="motion",
        help="With an anchor latent: whether it takes errors too. It has none at inference. Default: %(default)s.",
    )
    add(
        "--img_sigmas",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="Errors of conditions come from grids in this range of noise levels. Default: 0 1, all, as published.",
    )
    add(
        "--img_scale",
        type=float,
        nargs=2,
        default=(1.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="They are scaled by a random factor in this range. Default: 1 1, as published.",
    )
    add(
        "--boundary_steps",
        type=int,
        default=0,
        help="Every so many steps make the clips before the samples of the batch, and bank what is then wrong with "
        "their conditions, VAE round trip included. Default: 0, never, as published.",
    )
    add(
        "--p_boundary",
        type=float,
        default=0.5,
        help="Share of the errors on conditions that are such boundary errors of the sample. Default: %(default)s.",
    )
    add(
        "--boundary_sigma",
        type=float,
        default=0.8,
        help="Noise level that these clips are made from: at 1 nothing but the condition tells what they show, which "
        "suits videos that the prompt determines. Default: %(default)s.",
    )
    add("--boundary_inference_steps", type=int, default=4, help="Steps that they are made in. Default: %(default)s.")
    add("--num_grids", type=int, default=50, help="Grids of the error bank. Default: %(default)s.")
    add(
        "--bank_capacity",
        "--error_buffer_k",
        "--svi_max_errors_per_grid",
        "--buffer_size_per_bucket",
        type=int,
        default=500,
        help="Errors a grid holds. Default: %(default)s.",
    )
    add("--bank_max_gb", type=float, help="Lowers the capacity to so many gigabytes a process.")
    add("--bank_dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16", help="Default: %(default)s.")
    add("--bank_path", help="Keep the bank in this file, mapped into memory. Each process adds its number.")
    add(
        "--bank_mode",
        choices=("local", "sharded"),
        default="local",
        help="local: every process has a bank of its own, as published. sharded: one bank over all. Default: local.",
    )
    add(
        "--bank_replacement",
        "--buffer_replacement_strategy",
        "--replacement_strategy",
        type=lambda value: REPLACEMENT_ALIASES.get(value, value),
        choices=("l2", "random", "fifo"),
        default="l2",
        help="What a new error replaces in a full grid: the nearest, any, or the oldest. Default: %(default)s.",
    )
    add(
        "--clean_buffer_update_prob",
        type=float,
        default=0.1,
        help="Share of the clean samples whose errors are banked. Default: %(default)s.",
    )
    add(
        "--buffer_warmup_iter",
        "--svi_warmup_iter",
        type=int,
        default=50,
        help="First steps in which every process banks the errors of all. Default: %(default)s.",
    )

    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--output_dir", required=True, help="Where the LoRA, checkpoints, logs and films go.")
    add("--seed", type=int, default=0, help="Default: %(default)s.")
    add("--rank", "--lora_rank", type=int, default=128, help="Of the LoRA. Default: %(default)s.")
    add("--lora_alpha", type=float, help="Default: the rank, so that the LoRA's scale is 1.")
    add("--init_lora", help="LoRA to go on from, of the same rank: a file, or a folder or Hub repository with it.")
    add("--init_lora_weight_name", help="The file in that folder or repository.")
    add("--train_batch_size", type=int, default=1, help="Samples a step and process. Default: %(default)s.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Default: %(default)s.")
    add("--num_train_epochs", type=int, default=10, help="Default: %(default)s.")
    add("--max_train_steps", type=int, help="Instead of epochs.")
    add("--learning_rate", type=float, default=1e-4, help="Default: %(default)s; the paper has 2e-5.")
    add(
        "--lr_scheduler",
        choices=[scheduler.value for scheduler in SchedulerType if scheduler.value != "piecewise_constant"],
        default="constant",
        help="Default: %(default)s.",
    )
    add("--lr_warmup_steps", type=int, default=0, help="Default: %(default)s.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="Default: %(default)s.")
    add("--adam_beta2", type=float, default=0.999, help="Default: %(default)s.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Default: %(default)s.")
    add("--adam_epsilon", type=float, default=1e-8, help="Default: %(default)s.")
    add("--max_grad_norm", type=float, default=1.0, help="Default: %(default)s.")
    add("--flow_shift", "--sigma_shift", type=float, default=5.0, help="Of the training timesteps. Default: 5.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="Default: what accelerate is configured for.")
    add("--gradient_checkpointing", action="store_true", help="Less memory for more computing.")
    add("--allow_tf32", action="store_true", help="Faster float32 products on NVIDIA GPUs.")

    group = parser.add_argument_group("checkpoints, logs, validation")
    add = group.add_argument
    add("--checkpointing_steps", type=int, default=500, help="Default: %(default)s.")
    add("--checkpoints_total_limit", type=int, help="Keep so many of the last checkpoints.")
    add("--resume_from_checkpoint", help='"latest", or a checkpoint folder: go on, bit for bit as if never stopped.')
    add("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, all or none. Default: %(default)s.")
    add("--tracker_name", default="svi-erft", help="Name of the project there. Default: %(default)s.")
    add("--logging_dir", default="logs", help="Folder in `output_dir` for them. Default: %(default)s.")
    add("--validation_prompt", nargs="+", help="Prompts of a film, one a clip, made with the LoRA so far.")
    add("--validation_image", help="Its start image: file or URL.")
    add("--num_validation_clips", type=int, help="Clips of the film; the last prompt holds. Default: one a prompt.")
    add("--validation_steps", type=int, help="Make it every so many steps; it is always made at the end.")
    add("--validation_inference_steps", type=int, default=50, help="Default: %(default)s.")
    add("--validation_guidance_scale", type=float, default=5.0, help="Default: %(default)s.")
    add("--fps", type=int, default=16, help="Of the validation films. Default: %(default)s.")
    add(
        "--export_format",
        choices=("diffusers", "original"),
        default="diffusers",
        help="original: beside diffusers' layout, a file for ComfyUI and the authors' loader. Default: %(default)s.",
    )
    add(
        "--export_dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="Of the finished weights; checkpoints stay float32. Default: %(default)s.",
    )
    add(
        "--export_rank",
        type=int,
        help="Of the finished weights: a LoRA trained at a high rank, brought to a lower one by singular value "
        "decomposition; validation films show the trained one. Default: the rank.",
    )
    add("--push_to_hub", action="store_true", help="Push LoRA, model card and film to the Hub.")
    add("--hub_model_id", help="Repository there. Default: the name of `output_dir`.")
    add("--hub_token", help="Token for it; by default that of `hf auth login`.")

    args = parser.parse_args(arguments)
    for name, value in {"p_text_start": 0.0, **PRESETS[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    sources = [name for name in ("train_data_dir", "dataset_name", "world_videos") if getattr(args, name)]
    if len(sources) != 1:
        given = " and ".join(f"`--{name}`" for name in sources) or "none"
        raise ValueError(f"Give one of `--train_data_dir`, `--dataset_name` and `--world_videos`, got {given}.")
    for name in (
        "rank",
        "train_batch_size",
        "gradient_accumulation_steps",
        "samples_per_video",
        "checkpointing_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    if args.export_rank is not None and not 1 <= args.export_rank <= args.rank:
        raise ValueError(
            f"`--export_rank` can only lower the rank: it must be between 1 and {args.rank}, got {args.export_rank}."
        )
    for name in ("p_motion", "p_text_start", "proportion_empty_prompts", "boundary_sigma"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"`--{name}` is a share in [0, 1], got {getattr(args, name)}.")
    if args.boundary_steps < 0 or args.boundary_inference_steps < 1 or args.boundary_sigma == 0:
        raise ValueError(
            "Boundary errors need `--boundary_steps` of at least 0, `--boundary_inference_steps` of at least 1 and "
            f"`--boundary_sigma` above 0, got {args.boundary_steps}, {args.boundary_inference_steps} and "
            f"{args.boundary_sigma}."
        )
    if args.p_text_start and args.conditioning != "held":
        raise ValueError(f"`--p_text_start`={args.p_text_start} needs `--conditioning held`, got {args.conditioning}.")
    if args.conditioning != "pixel" and args.reference != "before":
        raise ValueError(
            f"`--reference`={args.reference}: the anchor of `--conditioning {args.conditioning}` comes from before "
            "the clip, as at inference. Use `--reference before`."
        )
    if (args.validation_prompt is None) != (args.validation_image is None):
        raise ValueError("A validation film needs both `--validation_prompt` and `--validation_image`.")
    image = args.validation_image
    if image and not image.startswith("http") and not os.path.isfile(image):
        raise ValueError(f"`--validation_image`={image!r} is not a file.")
    if args.quantize_base and not torch.cuda.is_available():
        raise ValueError(f"`--quantize_base={args.quantize_base}` needs a GPU: bitsandbytes quantizes nowhere else.")
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("`--hub_token` would be logged by wandb: use `hf auth login` instead.")
    make_scheme(args)
    make_injection(args)
    make_layout(args, make_scheme(args))


# What the arguments describe


def make_scheme(args: argparse.Namespace) -> Scheme:
    if args.conditioning == "pixel":
        return PixelMotion(num_frames=args.num_motion_frames, padding=args.padding)
    return {"latent": LatentMotion, "held": HeldLatents}[args.conditioning](num_latents=args.num_motion_latents)


def make_injection(args: argparse.Namespace) -> InjectionConfig:
    anchored = args.conditioning != "pixel" and args.img_slots == "motion"
    return InjectionConfig(
        p_vid=args.p_vid,
        p_noi=args.p_noi,
        p_img=args.p_img,
        p_clean=args.p_clean,
        n_img=args.n_img,
        first_img=1 if anchored else 0,
        # Held latents are given, not predicted: there are no errors on them.
        first_error=1 + args.num_motion_latents if args.conditioning == "held" else 0,
        img_sigmas=tuple(args.img_sigmas),
        img_scale=tuple(args.img_scale),
        p_boundary=args.p_boundary if args.boundary_steps else 0.0,
    )


def make_layout(args: argparse.Namespace, scheme: Scheme) -> SampleLayout:
    # source: issue 75 of the authors' repository; the first 1 + 4m frames of the clip re-tell the end of its history
    needs_history = isinstance(scheme, (LatentMotion, HeldLatents)) or args.boundary_steps
    history = args.num_frames - scheme.overlap if needs_history else 0
    return SampleLayout(
        num_frames=args.num_frames,
        height=args.height,
        width=args.width,
        history=history,
        reference=args.reference,
        augment=args.first_frame_augmentation,
        condition_frames=max(1, scheme.carried_frames),
        crop=args.world_videos is None,
    )


def find_videos(args: argparse.Namespace, layout: SampleLayout, scheme: Scheme) -> list[Video]:
    if args.world_videos:
        from diffusers_svi.tiny import world
        from diffusers_svi.tiny.videos import world_videos

        if (args.height, args.width) != (world.SIZE, world.SIZE):
            raise ValueError(
                f"The world of svi-tiny is {world.SIZE} x {world.SIZE} pixels: `--height` and `--width` must be "
                f"{world.SIZE}, got {args.height} x {args.width}."
            )
        sizes = args.num_frames, layout.history, scheme.overlap
        return world_videos(args.world_videos, args.seed, *sizes, args.world_setting)
    columns = {"video_column": args.video_column, "caption_column": args.caption_column}
    if args.train_data_dir:
        candidates = open_folder(args.train_data_dir, **columns)
    else:
        candidates = open_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, **columns)
    videos, skipped = usable_videos(candidates, layout, args.max_skipped_share)
    if skipped:
        logger.warning(skipped.describe())
    return videos


# The cache of latents and embeddings


class CachedSamples(torch.utils.data.Dataset):
    """What the encoders made of every sample, and its number."""

    def __init__(self, cache: TensorCache, keys: list[str], text_keys: list[str], history_text_keys: list[str]):
        self.cache, self.keys = cache, keys
        self.text_keys, self.history_text_keys = text_keys, history_text_keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {**self.cache.load(self.keys[index]), **self.cache.load(self.text_keys[index])}
        if "history_latents" in sample:
            sample["history_prompt_embeds"] = self.cache.load(self.history_text_keys[index])["prompt_embeds"]
        return {**sample, "number": torch.tensor(index)}


def model_fingerprint(folder: Path) -> str:
    """Of the encoders in a local model folder: their configurations and samples of their weights."""
    digest = hashlib.sha256()
    for component in ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"):
        for file in sorted((folder / component).rglob("*")):
            if not file.is_file():
                continue
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}".encode())
            with open(file, "rb") as stream:
                # Whatever changes weights changes both ends of the file; reading all of a text encoder takes long.
                digest.update(stream.read(2**20))
                stream.seek(max(0, file.stat().st_size - 2**20))
                digest.update(stream.read())
    return digest.hexdigest()


def to_image(frame: torch.Tensor) -> PIL.Image.Image:
    """A frame `(3, height, width)` in [-1, 1]."""
    return PIL.Image.fromarray(((frame + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def load_pipeline(folder: Path, accelerator: Accelerator, **components) -> SVIPipeline:
    """The pipeline with `components` instead of its own, on this process's device."""
    weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
    dtypes = {"vae": torch.float32, "image_encoder": torch.float32, "default": weight_dtype}
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # Under ZeRO-3 transformers would deal its models out to the processes.
        unset_hf_deepspeed_config()
    try:
        pipe = SVIPipeline.from_pretrained(folder, dtype=dtypes, **components)
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()
    return pipe.to(accelerator.device)


@torch.no_grad()
def encode_sample(
    pipe: SVIPipeline, sample: dict, scheme: Scheme, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    """Latents of the clip, the condition of a clip that goes on from another, and the one of a first clip."""
    device = pipe.vae.device
    video, frames, reference = (sample[name][None].to(device) for name in ("video", "condition", "reference"))
    clip, history = video[:, :, -args.num_frames :], video[:, :, : args.num_frames]
    # A film begins with its start image, which is the reference or anchor too.
    first_clip = sample["first"][None].to(device) if "first" in sample else clip
    begin = frames[:, :, :1] if first_clip is clip else first_clip[:, :, :1]
    known, first = {"image": reference}, {"image": begin[:, :, 0]}
    if scheme.carried_latents:
        known["latents"] = encode_video(pipe.vae, history)
    elif scheme.carried_frames:
        known["frames"] = frames
        first = {"image": first_clip[:, :, 0], "frames": begin}

    def condition(**known) -> torch.Tensor:
        if pipe.config.expand_timesteps:
            return scheme.held(pipe.vae, **known)
        return scheme.condition(pipe.vae, **known, num_frames=args.num_frames)

    encoded = {"latents": encode_video(pipe.vae, clip), "condition": condition(**known)}
    if args.p_motion < 1:
        encoded["first_condition"] = condition(**first)
        if first_clip is not clip:
            encoded["first_latents"] = encode_video(pipe.vae, first_clip)
    if args.boundary_steps:
        # What the clip before was made from, and what the scheme makes of its end when that is as it should be.
        carried = scheme.carried_frames
        before = {"image": reference, "frames": history[:, :, :carried]} if carried else {"image": history[:, :, 0]}
        end = {**known, "frames": history[:, :, -carried:]} if carried else known
        encoded["history_latents"] = known["latents"] if "latents" in known else encode_video(pipe.vae, history)
        encoded["history_condition"], encoded["true_condition"] = condition(**before), condition(**end)
        encoded["reference"] = reference
    if pipe.image_encoder is not None:
        if args.boundary_steps:
            encoded["history_image_embeds"] = pipe.encode_image(to_image(history[0, :, 0].cpu()), device)
        # source: the image that CLIP sees is the first condition frame; with an anchor latent, the anchor
        oldest = frames[:, :, 0] if scheme.carried_frames else reference
        encoded["image_embeds"] = pipe.encode_image(to_image(oldest[0].cpu()), device)
        if args.p_motion < 1:
            encoded["first_image_embeds"] = pipe.encode_image(to_image(begin[0, :, 0].cpu()), device)
    return {name: value[0].float().cpu() for name, value in encoded.items()}


@torch.no_grad()
def encode_caption(pipe: SVIPipeline, caption: str, max_sequence_length: int) -> torch.Tensor:
    embeds = pipe.encode_prompt(caption, None, False, max_sequence_length=max_sequence_length)[0]
    return embeds[0].float().cpu()


def fill_cache(
    args: argparse.Namespace, accelerator: Accelerator, samples: Samples, scheme: Scheme, folder: Path
) -> tuple[CachedSamples, torch.Tensor]:
    """The samples as encoded, and the embedding of the empty prompt.

    What is not in the cache yet is encoded, by every process its share; the encoders are loaded for that alone.
    """
    cache = TensorCache(args.latent_cache_dir or Path(args.output_dir) / "cache")
    encoders = model_fingerprint(folder)
    videos = [video for video in samples.videos for _ in range(args.samples_per_video)]
    captions = [video.caption for video in videos]
    history_captions = [video.history_caption or video.caption for video in videos]
    with_history = args.boundary_steps > 0
    kinds = [name for name, wanted in (("first", args.p_motion < 1), ("history", with_history)) if wanted]
    settings = (encoders, scheme.to_dict(), *kinds)
    keys = [fingerprint(samples.key(i), *settings) for i in range(len(samples))]
    text_settings = (encoders, str(WEIGHT_DTYPES[accelerator.mixed_precision]), args.max_sequence_length)
    used = {*captions, "", *(history_captions if with_history else ())}
    text_keys = {caption: fingerprint(*text_settings, caption) for caption in used}
    missing = [index for index, key in enumerate(keys) if key not in cache]
    missing_texts = sorted(caption for caption, key in text_keys.items() if key not in cache)
    # No process may look for what another one has already written.
    accelerator.wait_for_everyone()
    if missing or missing_texts:
        pipe = load_pipeline(folder, accelerator, transformer=None, transformer_2=None)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        bar = {"disable": not accelerator.is_main_process, "leave": False}
        for caption in tqdm(missing_texts[rank::world_size], desc="Encoding captions", **bar):
            embeds = encode_caption(pipe, caption, args.max_sequence_length)
            cache.save(text_keys[caption], {"prompt_embeds": embeds})
        loader = DataLoader(
            torch.utils.data.Subset(samples, missing[rank::world_size]),
            batch_size=None,
            num_workers=args.dataloader_num_workers,
        )
        for index, sample in zip(missing[rank::world_size], tqdm(loader, desc="Encoding clips", **bar), strict=True):
            cache.save(keys[index], encode_sample(pipe, sample, scheme, args))
        del pipe
        free_memory()
    accelerator.wait_for_everyone()
    dataset = CachedSamples(
        cache,
        keys,
        [text_keys[caption] for caption in captions],
        [text_keys.get(caption) for caption in history_captions],
    )
    return dataset, cache.load(text_keys[""])["prompt_embeds"]


# Training


def read_init_lora(args: argparse.Namespace) -> dict[str, torch.Tensor] | None:
    """The weights to go on from, at the scale of this run."""
    if args.init_lora is None:
        return None
    lora = read_lora(args.init_lora, args.init_lora_weight_name, cache_dir=args.cache_dir)
    ranks = {value.shape[0] for name, value in lora.state_dict.items() if ".lora_A." in name}
    if ranks != {args.rank}:
        raise ValueError(
            f"`--init_lora`: {lora.name!r} has rank {', '.join(map(str, sorted(ranks)))}, but `--rank` is {args.rank}."
        )
    # Files without settings are of scale 1.
    alpha = (lora.adapter_metadata or {}).get("transformer.lora_alpha", args.rank)
    return {
        name.removeprefix("transformer."): value.float() * (alpha / args.lora_alpha if ".lora_B." in name else 1)
        for name, value in lora.state_dict.items()
    }


def load_transformer(
    args: argparse.Namespace,
    folder: Path,
    subfolder: str,
    weight_dtype: torch.dtype,
    init_lora: dict[str, torch.Tensor] | None,
) -> WanTransformer3DModel:
    """The frozen base with a float32 LoRA on it."""
    quantization = None
    if args.quantize_base == "4bit":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=weight_dtype
        )
    elif args.quantize_base == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    transformer = WanTransformer3DModel.from_pretrained(
        folder, subfolder=subfolder, dtype=weight_dtype, quantization_config=quantization
    )
    transformer.requires_grad_(False)
    if quantization is not None:
        transformer = prepare_model_for_kbit_training(transformer, use_gradient_checkpointing=False)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=TARGET_MODULES))
    cast_training_params(transformer, dtype=torch.float32)
    if init_lora is not None:
        own, given = get_peft_model_state_dict(transformer).keys(), init_lora.keys()
        if own != given:
            raise ValueError(
                f"`--init_lora` does not fit: it lacks {len(own - given)} of {len(own)} weights of this model's LoRA, "
                f"and has {len(given - own)} others."
            )
        set_peft_model_state_dict(transformer, init_lora)
    return transformer


def training_timesteps(args: argparse.Namespace, boundary: float | None) -> torch.Tensor:
    """Indices into the 1000 training noise levels: all of them, or those on the expert's side of the boundary."""
    sigmas = shifted_sigmas(TRAIN_TIMESTEPS, args.flow_shift)
    if args.expert is None:
        return torch.arange(TRAIN_TIMESTEPS)
    return ((sigmas >= boundary) == (args.expert == "high")).nonzero().flatten()


def make_recycler(
    args: argparse.Namespace, accelerator: Accelerator, dataset: CachedSamples, timesteps: torch.Tensor
) -> ErrorRecycler:
    """Banks and recycler of this process, for the training noise levels that `timesteps` are the indices of."""
    error_shape = tuple(dataset[0]["latents"].shape)
    grids = shifted_sigmas(args.num_grids, args.flow_shift)
    rank = accelerator.process_index
    config = BankConfig(
        num_grids=args.num_grids,
        capacity=args.bank_capacity,
        replacement=args.bank_replacement,
        dtype=args.bank_dtype,
        byte_budget=None if args.bank_max_gb is None else int(args.bank_max_gb * 1e9),
        path=args.bank_path and f"{args.bank_path}.{rank}",
    )
    if args.bank_mode == "sharded" and accelerator.num_processes > 1:
        bank = ShardedErrorBank(error_shape, grids, config, accelerator.device)
    else:
        # An expert never meets the grids of the other.
        reached = nearest_grid(shifted_sigmas(TRAIN_TIMESTEPS, args.flow_shift)[timesteps], grids).unique().tolist()
        bank = ErrorBank(error_shape, grids, config, owned=reached)
    boundary = None
    if args.boundary_steps:
        # The last two errors of every sample: older ones are of a model that is no more.
        boundary_config = BankConfig(
            num_grids=len(dataset),
            capacity=2,
            replacement="fifo",
            dtype=args.bank_dtype,
            path=args.bank_path and f"{args.bank_path}.boundary.{rank}",
        )
        boundary = ErrorBank(tuple(dataset[0]["true_condition"].shape), torch.ones(len(dataset)), boundary_config)
    recycler_config = RecyclerConfig(
        clean_buffer_update_prob=args.clean_buffer_update_prob, buffer_warmup_iter=args.buffer_warmup_iter
    )
    return ErrorRecycler(bank, make_injection(args), recycler_config, args.seed * 1000 + rank, boundary)


@dataclass
class TrainingStep:
    """What a batch becomes: its losses, and the residuals that are to be banked."""

    args: argparse.Namespace
    transformer: torch.nn.Module
    recycler: ErrorRecycler
    generator: torch.Generator
    # Indices of the training noise levels that are drawn.
    timesteps: torch.Tensor
    no_prompt: torch.Tensor
    patch_size: tuple[int, int, int]
    expand_timesteps: bool
    weight_dtype: torch.dtype

    def __post_init__(self):
        self.sigmas = shifted_sigmas(TRAIN_TIMESTEPS, self.args.flow_shift)
        self.weights = loss_weights(TRAIN_TIMESTEPS, self.args.flow_shift)

    def choose_condition(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Condition latents and image embeddings of a batch, and which of its clips go on from another.

        The others are first clips.
        """
        args, condition, image_embeds = self.args, batch["condition"], batch.get("image_embeds")
        all_alike = torch.ones(len(condition), dtype=torch.bool)
        first, text = torch.rand(2, len(condition), generator=self.generator, dtype=torch.float64)
        if args.conditioning == "held":
            # Held latents stand in for the first of a clip: a batch has as many of them throughout.
            if text[0] < args.p_text_start:
                return condition[:, :, :0], image_embeds, ~all_alike
            if first[0] >= args.p_motion:
                return batch["first_condition"], image_embeds, ~all_alike
            return condition, image_embeds, all_alike
        if args.p_motion == 1:
            return condition, image_embeds, all_alike
        goes_on = first < args.p_motion
        on_device = goes_on.to(condition.device)
        condition = torch.where(on_device.view(-1, 1, 1, 1, 1), condition, batch["first_condition"])
        if image_embeds is not None:
            image_embeds = torch.where(on_device.view(-1, 1, 1), image_embeds, batch["first_image_embeds"])
        return condition, image_embeds, goes_on

    def choose_prompt(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt embeddings of a batch, some of them empty."""
        embeds, share = batch["prompt_embeds"], self.args.proportion_empty_prompts
        if not share:
            return embeds
        dropped = torch.rand(len(embeds), generator=self.generator) < share
        return torch.where(dropped.to(embeds.device).view(-1, 1, 1), self.no_prompt.to(embeds), embeds)

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Switches]:
        """Losses `(batch,)`, residuals and noise levels of a batch, and the switches it was corrupted by."""
        latents, generator = batch["latents"], self.generator
        condition, image_embeds, goes_on = self.choose_condition(batch)
        if "first_latents" in batch:
            latents = torch.where(goes_on.to(latents.device).view(-1, 1, 1, 1, 1), latents, batch["first_latents"])
        prompt_embeds = self.choose_prompt(batch)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        picks = self.timesteps[torch.randint(len(self.timesteps), (len(latents),), generator=generator)]
        sigmas, weights = (values[picks].to(latents.device).float() for values in (self.sigmas, self.weights))

        samples = torch.where(goes_on, batch["number"].cpu(), -1)
        injected = self.recycler.inject(latents, noise, condition, sigmas, samples)
        noisy = interpolate(injected.latents, injected.noise, sigmas)
        prediction = self.predict(noisy, injected.condition, sigmas, prompt_embeds, image_embeds)
        target = recycled_velocity(latents, injected.noise)
        residual, mask = prediction - target, None
        if self.expand_timesteps:
            mask = torch.ones_like(target[:1, :1, :, :1, :1])
            mask[:, :, : condition.shape[2]] = 0
            residual = residual * mask
        losses = erft_loss(prediction, target, weights, mask)
        return losses, residual.detach(), sigmas, injected.switches

    def predict(
        self,
        noisy: torch.Tensor,
        condition: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: torch.Tensor,
        image_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        """Velocities, in the shape of `noisy`, float32."""
        hidden_states, timesteps = transformer_inputs(noisy, condition, sigmas, self.patch_size, self.expand_timesteps)
        return self.transformer(
            hidden_states=hidden_states.to(self.weight_dtype),
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds.to(self.weight_dtype),
            encoder_hidden_states_image=None if image_embeds is None else image_embeds.to(self.weight_dtype),
            return_dict=False,
        )[0].float()

    @torch.no_grad()
    def recycle_boundary(self, batch: dict[str, torch.Tensor], vae: AutoencoderKLWan, scheme: Scheme) -> None:
        """Make the clip before every sample of a batch, and bank the errors of the conditions it leaves."""
        condition, samples, generator = batch["history_condition"], batch["number"], self.generator
        # In a chain that clip began with an error too: half of them have the one known of the sample.
        met = torch.rand(len(samples), generator=generator) < 0.5
        condition = self.recycler.with_boundary_errors(condition, torch.where(met, samples.cpu(), -1))
        noise = torch.randn(batch["latents"].shape, generator=generator).to(condition.device)

        def predict(noisy: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
            embeds = batch["history_prompt_embeds"], batch.get("history_image_embeds")
            return self.predict(noisy, condition, sigmas, *embeds)

        args = self.args
        latents = denoise(
            predict,
            batch["history_latents"],
            noise,
            args.boundary_sigma,
            args.boundary_inference_steps,
            args.flow_shift,
        )
        if self.expand_timesteps:
            latents = torch.cat([condition, latents[:, :, condition.shape[2] :]], dim=2)
        reached = next_condition(vae, scheme, batch["reference"], latents, args.num_frames, self.expand_timesteps)
        self.recycler.recycle_boundary(reached - batch["true_condition"], samples)


# Checkpoints


def unwrap(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
    model = accelerator.unwrap_model(model)
    return model._orig_mod if is_compiled_module(model) else model


def lora_state_dict(
    accelerator: Accelerator, transformer: torch.nn.Module, rank: int | None = None
) -> dict[str, torch.Tensor]:
    """The LoRA's weights, or the nearest of a lower `rank`, with an alpha equal to it.

    Under ZeRO-3 they are put together from all processes, which must all call this.
    """
    model, gathered = unwrap(accelerator, transformer), nullcontext()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad])
    with gathered, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a PEFT adapter to LoRA that is already a LoRA")
        state_dict = convert_to_lora(model, rank)[1] if rank else get_peft_model_state_dict(model)
        return {name: value.detach().cpu().clone() for name, value in state_dict.items()}


class Checkpoints:
    """The folders `checkpoint-<step>`; each has its name only when all that belongs into it is there."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, recycler: ErrorRecycler, generator):
        self.folder, self.limit = Path(args.output_dir), args.checkpoints_total_limit
        self.accelerator, self.recycler, self.generator = accelerator, recycler, generator
        self.unfinished: Path | None = None
        self.writers: list[BankWriter] = []
        self.banks = {"bank": recycler.bank}
        if recycler.boundary is not None:
            self.banks["boundary"] = recycler.boundary
        if accelerator.is_main_process:
            for leftover in self.folder.glob(f"checkpoint-*{UNFINISHED}"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def save(self, step: int) -> None:
        """Write everything but the bank now, and begin to write the bank; training may go on."""
        self.finish()
        self.unfinished = self.folder / f"checkpoint-{step}{UNFINISHED}"
        options = {"exclude_frozen_parameters": True} if self.accelerator.state.deepspeed_plugin else {}
        self.accelerator.save_state(str(self.unfinished), **options)
        rank = self.accelerator.process_index
        state = {**self.recycler.state_dict(), "noise_generator": self.generator.get_state()}
        save_file(state, self.unfinished / f"recycler-{rank}.safetensors")
        self.writers = [
            save_bank(bank, self.unfinished / f"{name}-{rank}.safetensors") for name, bank in self.banks.items()
        ]

    def poll(self) -> None:
        """Give the checkpoint its name if every process has written its bank."""
        if self.unfinished is None or not self.accelerator.is_main_process:
            return
        ranks = range(self.accelerator.num_processes)
        if not all((self.unfinished / f"{name}-{rank}.safetensors").exists() for rank in ranks for name in self.banks):
            return
        self.unfinished.rename(self.unfinished.with_name(self.unfinished.name.removesuffix(UNFINISHED)))
        self.unfinished = None
        for path in self.all()[: -self.limit] if self.limit else []:
            shutil.rmtree(path)

    def finish(self) -> None:
        """Wait until the checkpoint has its name."""
        for writer in self.writers:
            writer.wait()
        self.writers = []
        self.accelerator.wait_for_everyone()
        self.poll()
        self.accelerator.wait_for_everyone()
        self.unfinished = None

    def resume(self, name: str) -> int:
        """Load a checkpoint and return its step."""
        if name == "latest":
            if not self.all():
                logger.info(f"No checkpoint in {self.folder} yet: this is a new run.")
                return 0
            path = self.all()[-1]
        else:
            path = Path(name) if Path(name).is_dir() else self.folder / name
            if path not in self.all() and not path.is_dir():
                known = [checkpoint.name for checkpoint in self.all()]
                raise ValueError(f"`--resume_from_checkpoint`={name!r} is no checkpoint. There are: {known}.")
        # DeepSpeed's part has no frozen weights: they are those of the base.
        options = {"load_module_strict": False} if self.accelerator.state.deepspeed_plugin else {}
        self.accelerator.load_state(str(path), **options)
        rank = self.accelerator.process_index
        file = path / f"recycler-{rank}.safetensors"
        if not file.exists():
            raise ValueError(f"{path} was written by fewer processes than the {self.accelerator.num_processes} now.")
        state = load_file(file)
        self.generator.set_state(state.pop("noise_generator"))
        self.recycler.load_state_dict(state)
        for name, bank in self.banks.items():
            load_bank(bank, path / f"{name}-{rank}.safetensors")
        logger.info(f"Going on from {path}.")
        return int(path.name.split("-")[1])


# Validation and what is handed over


@torch.no_grad()
def make_film(
    args: argparse.Namespace,
    accelerator: Accelerator,
    transformer: torch.nn.Module,
    folder: Path,
    subfolder: str,
    scheme: Scheme,
    step: int,
) -> dict:
    """A film of `validation_prompt`, by the pipeline that will use the LoRA, and how it drifts. Main process only."""
    pipe = load_pipeline(folder, accelerator, **{subfolder: unwrap(accelerator, transformer)})
    pipe.set_progress_bar_config(desc=f"Film at step {step}", leave=False)
    num_clips = args.num_validation_clips or len(args.validation_prompt)
    with accelerator.autocast():
        clips = [
            clip.frames
            for clip in pipe.stream(
                image=load_image(args.validation_image).resize((args.width, args.height)),
                prompts=args.validation_prompt,
                num_clips=num_clips,
                conditioning=scheme,
                height=args.height,
                width=args.width,
                num_frames=args.num_frames,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                max_sequence_length=args.max_sequence_length,
                generator=torch.Generator().manual_seed(args.seed),
            )
        ]
    del pipe
    free_memory()
    film_folder = Path(args.output_dir) / "validation"
    film_folder.mkdir(exist_ok=True)
    path = film_folder / f"step-{step}.mp4"
    export_to_video(list(np.concatenate(clips)), str(path), fps=args.fps)
    # The last frame of every clip side by side, to be looked at where no video plays.
    strip = np.concatenate([clip[-1] for clip in clips], axis=1)
    PIL.Image.fromarray((strip * 255).round().astype(np.uint8)).save(path.with_suffix(".png"))
    figures = drift_figures(clips)
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", strip, step, dataformats="HWC")
        elif tracker.name in ("wandb", "trackio"):
            module = __import__(tracker.name)
            tracker.log({"validation": module.Video(str(path), format="mp4")}, step=step)
    accelerator.log({f"validation/{name}": values[-1] for name, values in figures.items()}, step=step)
    return {"film": path, **figures}


def write_model_card(args: argparse.Namespace, scheme: Scheme, repo_id: str, validation: dict | None) -> None:
    settings = (
        "preset",
        "expert",
        "init_lora",
        "rank",
        "lora_alpha",
        "export_rank",
        "p_vid",
        "p_img",
        "p_noi",
        "p_clean",
        "n_img",
        "img_slots",
        "img_sigmas",
        "img_scale",
        "boundary_steps",
        "p_boundary",
        "num_grids",
        "bank_capacity",
        "learning_rate",
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "num_frames",
        "height",
        "width",
        "seed",
    )
    rows = "\n".join(f"| {name} | {getattr(args, name)} |" for name in settings if getattr(args, name) is not None)
    expert = {"high": "", "low": ", load_into_transformer_2=True", None: ""}[args.expert]
    base, is_local = args.pretrained_model_name_or_path, os.path.isdir(args.pretrained_model_name_or_path)
    if args.p_clean == 1 or not (args.p_vid or args.p_img or args.p_noi):
        method = "by plain tuning on clean conditions, the control of error recycling"
    else:
        method = "by error recycling"
    text = f"""# SVI LoRA: {repo_id}

A LoRA for {f"`{base}`" if is_local else f"[{base}](https://huggingface.co/{base})"} for
videos of any length, trained {method} ([paper](https://arxiv.org/abs/2510.09212)) with diffusers_svi.
Clips are chained by `{scheme}`, which `load_lora_weights` reads from the file.

```python
import torch
from diffusers.utils import export_to_video, load_image
from diffusers_svi import SVIPipeline

pipe = SVIPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo_id}", weight_name="{LORA_NAME}"{expert})
film = pipe(
    image=load_image("start.png"),
    prompts=["what the first clip shows", "what the next one shows"],
    height={args.height},
    width={args.width},
    num_frames={args.num_frames},
).frames[0]
export_to_video(film, "film.mp4", fps={args.fps})
```

| setting | |
|---|---|
{rows}
"""
    if validation is not None:
        names = [name for name in validation if name != "film"]
        table = "\n".join(
            f"| {clip + 1} | " + " | ".join(f"{validation[name][clip]:.3f}" for name in names) + " |"
            for clip in range(len(validation[names[0]]))
        )
        text += f"""
## Sample

[{len(validation[names[0]])} clips](validation/{validation["film"].name}) from one image, last frames:

![last frame of every clip](validation/{validation["film"].stem}.png)

How its clips differ from the first, in their last frames:

| clip | {" | ".join(name.replace("_", " ") for name in names)} |
|---|{"---|" * len(names)}
{table}
"""
    data = ModelCardData(
        # The Hub takes no local folder for a model.
        base_model=None if is_local else base,
        library_name="diffusers",
        pipeline_tag="image-to-video",
        tags=["image-to-video", "diffusers", "diffusers-training", "lora", "wan", "svi"],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(os.path.join(args.output_dir, "README.md"))


def main(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(output_dir / args.logging_dir)
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]

    # The model's settings
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        with accelerator.main_process_first():
            folder = Path(
                snapshot_download(args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir)
            )
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"`--pretrained_model_name_or_path`={folder} has no model_index.json: is it in diffusers' layout?"
        )
    index = json.loads((folder / "model_index.json").read_text())
    expand_timesteps = bool(index.get("expand_timesteps"))
    has_experts = (index.get("transformer_2") or [None])[0] is not None
    if has_experts != (args.expert is not None):
        raise ValueError(
            "This model has two experts: choose one with `--expert high` or `--expert low`."
            if has_experts
            else f"`--expert {args.expert}`: this model has only one transformer."
        )
    subfolder = "transformer_2" if args.expert == "low" else "transformer"
    scheme = make_scheme(args)
    scheme.check(args.num_frames, expand_timesteps)
    init_lora = read_init_lora(args)

    # Data
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    layout = make_layout(args, scheme)
    samples = Samples(find_videos(args, layout, scheme), layout, args.seed, args.samples_per_video)
    dataset, no_prompt = fill_cache(args, accelerator, samples, scheme, folder)

    # The transformer and its LoRA, which begins with the same random numbers whatever was encoded before
    set_seed(args.seed)
    transformer = load_transformer(args, folder, subfolder, weight_dtype, init_lora)
    if not args.quantize_base:
        transformer.to(accelerator.device)
    config = next(iter(transformer.peft_config.values()))
    patch_size = transformer.config.patch_size

    def write_lora(file: Path, state_dict: dict[str, torch.Tensor], form: str = "diffusers") -> None:
        save_lora(file, state_dict, config, scheme, args.expert, form)

    def save_model_hook(models, weights, folder):
        state_dict = lora_state_dict(accelerator, models[0])
        if accelerator.is_main_process:
            write_lora(Path(folder) / LORA_NAME, state_dict)
        if weights:
            weights.pop()

    def load_model_hook(models, folder):
        # DeepSpeed has loaded its own, LoRA included.
        if models:
            state_dict = read_lora(folder, LORA_NAME).state_dict
            state_dict = {name.removeprefix("transformer."): value for name, value in state_dict.items()}
            set_peft_model_state_dict(unwrap(accelerator, models.pop()), state_dict)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    # Optimizer, data loader, learning rate
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    optimizer_class = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("`--use_8bit_adam` needs bitsandbytes: `pip install bitsandbytes`.") from error
        optimizer_class = bitsandbytes.optim.AdamW8bit
    optimizer = optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    dataloader = DataLoader(
        dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=len(dataset) >= args.train_batch_size * accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator().manual_seed(args.seed),
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=count_steps(args, dataloader, accelerator.num_processes) * accelerator.num_processes,
    )
    transformer, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        transformer, optimizer, dataloader, lr_scheduler
    )
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch

    # Error recycling
    timesteps = training_timesteps(args, index.get("boundary_ratio"))
    recycler = make_recycler(args, accelerator, dataset, timesteps)
    generator = torch.Generator().manual_seed(args.seed * 1000 + 500 + accelerator.process_index)
    vae = None
    if args.boundary_steps:
        vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(accelerator.device)
    training_step = TrainingStep(
        args, transformer, recycler, generator, timesteps, no_prompt, patch_size, expand_timesteps, weight_dtype
    )

    # Resume
    checkpoints = Checkpoints(args, accelerator, recycler, generator)
    global_step = checkpoints.resume(args.resume_from_checkpoint) if args.resume_from_checkpoint else 0
    if accelerator.is_main_process and accelerator.log_with:
        values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
        accelerator.init_trackers(args.tracker_name, config={k: v for k, v in values.items() if k != "hub_token"})

    # Train
    accelerator.print(
        f"Training a LoRA of rank {args.rank} ({num_parameters:,} parameters) on "
        f"{len(dataset)} samples of {len(samples.videos)} videos, {args.max_train_steps} steps of "
        f"{args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps} samples.\n"
        f"{scheme}\n{recycler.injection}\n" + "\n".join(bank.describe() for bank in checkpoints.banks.values())
    )
    progress = tqdm(
        total=args.max_train_steps, initial=global_step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    transformer.train()
    validation, film_step = None, None
    seen = {"clean": [], "corrupted": []}
    while global_step < args.max_train_steps:
        epoch, done = divmod(global_step, steps_per_epoch)
        dataloader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(dataloader, done * args.gradient_accumulation_steps)
        batches = batches if done else dataloader
        for batch in batches:
            with accelerator.accumulate(transformer):
                losses, residual, sigmas, switches = training_step(batch)
                accelerator.backward(losses.mean())
                recycler.recycle(residual, sigmas, switches)
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            for loss, clean in zip(losses.tolist(), switches.clean.tolist(), strict=True):
                seen["clean" if clean else "corrupted"].append(loss)
            if not accelerator.sync_gradients:
                continue
            global_step += 1
            progress.update()
            if args.boundary_steps and global_step % args.boundary_steps == 0:
                training_step.recycle_boundary(batch, vae, scheme)
            all_losses = seen["clean"] + seen["corrupted"]
            logs = {"loss": sum(all_losses) / len(all_losses), "lr": lr_scheduler.get_last_lr()[0]}
            progress.set_postfix(loss=f"{logs['loss']:.4f}", errors=int(recycler.bank.counts.sum()))
            logs.update({f"loss/{kind}": sum(values) / len(values) for kind, values in seen.items() if values})
            if norm is not None:
                logs["grad_norm"] = float(norm)
            logs["bank/errors"] = int(recycler.bank.counts.sum())
            accelerator.log(logs, step=global_step)
            seen = {"clean": [], "corrupted": []}
            checkpoints.poll()
            if global_step % args.checkpointing_steps == 0:
                checkpoints.save(global_step)
            if args.validation_prompt and args.validation_steps and global_step % args.validation_steps == 0:
                film_step = global_step
                if accelerator.is_main_process:
                    validation = make_film(args, accelerator, transformer, folder, subfolder, scheme, global_step)
                accelerator.wait_for_everyone()
                transformer.train()
            if global_step >= args.max_train_steps:
                break
    progress.close()
    checkpoints.finish()

    # Save, validate, push
    state_dict = lora_state_dict(accelerator, transformer, args.export_rank)
    if args.export_rank:
        config = replace(config, r=args.export_rank, lora_alpha=args.export_rank)
    state_dict = {name: value.to(getattr(torch, args.export_dtype)) for name, value in state_dict.items()}
    if accelerator.is_main_process:
        write_lora(output_dir / LORA_NAME, state_dict)
        if args.export_format == "original":
            write_lora(output_dir / ORIGINAL_LORA_NAME, state_dict, "original")
        if args.validation_prompt and film_step != global_step:
            validation = make_film(args, accelerator, transformer, folder, subfolder, scheme, global_step)
        repo_id = args.hub_model_id or output_dir.name
        if args.push_to_hub:
            repo_id = create_repo(repo_id, exist_ok=True, token=args.hub_token).repo_id
        write_model_card(args, scheme, repo_id, validation)
        if args.push_to_hub:
            upload_folder(
                repo_id=repo_id,
                folder_path=output_dir,
                commit_message="SVI LoRA",
                token=args.hub_token,
                allow_patterns=["README.md", "*.safetensors", "validation/*"],
                ignore_patterns=["checkpoint-*/*", "cache/*"],
            )
        accelerator.print(f"Saved {output_dir / LORA_NAME}.")
    accelerator.end_training()


def count_steps(args: argparse.Namespace, dataloader: DataLoader, num_processes: int) -> int:
    """Optimizer steps of the run, before the data loader is divided among the processes."""
    if args.max_train_steps:
        return args.max_train_steps
    batches = math.ceil(len(dataloader) / num_processes)
    return args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps)


if __name__ == "__main__":
    try:
        main(parse_args())
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
