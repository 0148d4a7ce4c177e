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
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DataLoaderConfiguration,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    get_int_from_env,
    set_seed,
)
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import free_memory
from diffusers.utils import load_image
from peft import LoraConfig, set_peft_model_state_dict
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers.integrations import unset_hf_deepspeed_config

from diffusers_svi import NEGATIVE_PROMPT, HeldLatents, LatentMotion, PixelMotion, SVIEulerScheduler, SVIPipeline
from diffusers_svi.conditioning import Scheme
from diffusers_svi.conditions.dropout import PUBLISHED_SHARES, ConditionDropout, blank
from diffusers_svi.conditions.following import PIPELINES
from diffusers_svi.conditions.rows import ROW_FILES, Rows
from diffusers_svi.conditions.trained_condition import TrainedCondition
from diffusers_svi.conditions.trained_modules import load_modules, modules_to_save
from diffusers_svi.erft import (
    BankConfig,
    ErrorBank,
    ErrorRecycler,
    InjectionConfig,
    RecyclerConfig,
    ShardedErrorBank,
    erft_loss,
    restoration_weights,
    restorative_velocity,
    self_error,
)
from diffusers_svi.erft.bank import reached_grids
from diffusers_svi.flow import interpolate, shifted_sigmas
from diffusers_svi.lora_file import EXPERTS, read_lora, save_lora
from diffusers_svi.published import audio_encoder_revision
from diffusers_svi.training.average import MovingAverage, all_applied
from diffusers_svi.training.block_offload import BlockOffload
from diffusers_svi.training.buckets import (
    BucketBatchSampler,
    bucket_name,
    choose_bucket,
    describe_buckets,
    read_buckets,
)
from diffusers_svi.training.cache import CachedSamples, TensorCache
from diffusers_svi.training.checkpoints import Checkpoints, find_checkpoint, list_checkpoints
from diffusers_svi.training.encode import encode_samples, fingerprint_encoders
from diffusers_svi.training.environment import check_file_writable, check_trackers, check_writable, own_folder
from diffusers_svi.training.films import save_film
from diffusers_svi.training.finite import all_finite
from diffusers_svi.training.known_elsewhere import explain
from diffusers_svi.training.layers import parse_layers, without_modules
from diffusers_svi.training.lora_model import load_transformer, lora_state_dict, read_init_lora, unwrap
from diffusers_svi.training.model_card import TrainedLora, weight_name, write_model_card
from diffusers_svi.training.offload import offload_encoders
from diffusers_svi.training.optimizers import (
    LEARNING_RATES,
    OPTIMIZERS,
    apply_learning_rate,
    check_optimizer,
    make_optimizer,
)
from diffusers_svi.training.push import PushError, download_model, open_repo, push
from diffusers_svi.training.quantized import BITSANDBYTES, QUANTIZATIONS, check_quantization
from diffusers_svi.training.ranges import check_buckets, check_combinations, check_condition_options, check_ranges
from diffusers_svi.training.run_arguments import (
    check_steps,
    compare_arguments,
    compare_content,
    describe_arguments,
    describe_content,
    read_run,
    write_run,
)
from diffusers_svi.training.samples import SampleLayout, Samples
from diffusers_svi.training.sources import open_dataset, open_folder, usable_videos
from diffusers_svi.training.step_times import StepTimes
from diffusers_svi.training.turns import Pair, put_by, take_turns
from diffusers_svi.training.weighting import SCHEMES, timestep_pool, timestep_weights
from diffusers_svi.training.zero import check_beside_zero, deal_out, zero_stage
from diffusers_svi.wan import num_latent_frames, transformer_inputs


logger = get_logger(__name__)

TRAIN_TIMESTEPS = 1000
# After so many steps of a run it is told how long it takes.
STEPS_TO_TELL = 10
LORA_NAME = "pytorch_lora_weights.safetensors"
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# How launchers tell how many processes are on this machine: torchrun, DeepSpeed, MPI.
LOCAL_PROCESSES = ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"]
# What a preset sets; an option given on the command line wins.
SHOT = {
    "conditioning": "pixel",
    "padding": "reference",
    "num_motion_frames": 1,
    "p_motion": 1.0,
    "p_text_start": 0.0,
    "p_vid": 0.9,
    "p_img": 0.9,
    "p_noi": 0.01,
    "p_clean": 0.2,
    "n_img": 3,
    "reference": "inside",
    "first_frame_augmentation": False,
    "fps": 16,
}
FILM = {**SHOT, "padding": "zeros", "num_motion_frames": 5, "p_motion": 0.9, "p_clean": 0.5}
TALK = {**SHOT, "condition": "audio", "fps": 25}
DANCE = {**SHOT, "condition": "pose", "n_img": 1}
PRO = {**SHOT, "conditioning": "latent", "reference": "before", "n_img": 1}
TI2V = {**PRO, "conditioning": "held", "fps": 24, "p_motion": 0.8, "p_text_start": 0.1, "p_vid": 0.0, "p_noi": 0.0}
PRESETS = {
    "shot": SHOT,
    "film": FILM,
    "film-2.0": {**FILM, "padding": "reference", "reference": "outside", "first_frame_augmentation": True},
    "talk": TALK,
    "dance": DANCE,
    "pro": PRO,
    "ti2v-5b": TI2V,
    "none": {**SHOT, "padding": "zeros", "p_vid": 0.0, "p_img": 0.0, "p_noi": 0.0, "p_clean": 1.0},
}
# Of clips, where nothing else is given.
SIZE = {"width": 832, "height": 480, "num_frames": 81}
REPLACEMENT_ALIASES = {"l2_batch": "l2", "l2_similarity": "l2"}
CARD_SETTINGS = (
    *("preset", "expert", "init_lora", "quantize_base", "rank", "lora_alpha", "export_rank"),
    *("condition", "audio_encoder", "condition_modules", "train_condition_modules", "p_no_condition", "p_no_image"),
    *("objective", "errors", "p_vid", "vid_sigmas", "p_img", "p_noi", "p_clean"),
    *("n_img", "img_slots", "img_sigmas", "img_scale", "num_grids", "bank_capacity", "learning_rate", "flow_shift"),
    *("train_batch_size", "gradient_accumulation_steps", "max_train_steps"),
    *("num_frames", "height", "width", "buckets"),
    *("fps", "seed"),
)


# 1. Arguments


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Tells the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def frame_rate(value: str) -> int | str:
    return value if value == "none" else int(value)


def module_size(value: str) -> tuple[str, int]:
    name, _, number = value.partition("=")
    return name, int(number)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="Wan I2V model for diffusers: Hub name or folder.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Of its weight files, fp16 say.")
    add("--cache_dir", help="Where downloads from the Hub are kept.")
    text = "Wan 2.2 A14B: which expert to train, on its side of the boundary; or both, in turns, a LoRA each."
    add("--expert", choices=(*EXPERTS, "both"), help=text)
    text = "With both: steps of a turn, in which the other expert is on the CPU."
    add("--expert_switch_steps", type=int, default=100, help=text)
    text = (
        "Load the frozen base quantized (QLoRA): 4bit and 8bit by bitsandbytes, int8 and fp8 by torchao. For long "
        "films use the LoRA on the full base."
    )
    add("--quantize_base", choices=QUANTIZATIONS, help=text)
    text = (
        "Keep the blocks of the frozen base on the CPU but when they compute, the next one copied meanwhile. Needs "
        "--gradient_checkpointing."
    )
    add("--group_offload", action="store_true", help=text)
    text = "Tiles in the VAE, for less memory. Not as published: over many clips, tiles leave traces."
    add("--enable_tiling", "--tiled", action="store_true", help=text)
    add("--offload", action="store_true", help="Keep encoders and VAE on the CPU but when they are used.")

    add = parser.add_argument_group("data, one of the two sources").add_argument
    add(
        "--train_data_dir",
        "--dataset_path",
        help="Folder of videos with a CSV or JSONL file of captions, the authors' CSV included.",
    )
    add("--dataset_name", help="Hugging Face dataset with a video column: Hub name or folder.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--video_column", help="Column of the videos; found by its name if not given.")
    add("--caption_column", help="Column of the captions; found by its name if not given.")
    add("--height", type=int, help=f"Of the clips, in pixels; {SIZE['height']} if not given.")
    add("--width", type=int, help=f"Of the clips, in pixels; {SIZE['width']} if not given.")
    add("--num_frames", type=int, help=f"Frames of a clip, 1 + 4n; {SIZE['num_frames']} if not given.")
    text = (
        "Instead of them: sizes, width x height, or x frames too, such as 832x480 480x832x49. A video goes to the one "
        "nearest in aspect, the longest that it fills; each has an error bank of its own. Films are of the first."
    )
    add("--buckets", nargs="+", help=text)
    add("--center_crop", action="store_true", help="Take the largest crop, from the middle, instead of a random one.")
    add("--random_flip", action="store_true", help="Mirror half of the samples. Do captions tell left from right?")
    text = (
        "Frames a second: videos are resampled to them, films have them. 16 if not given, 24 for ti2v-5b, 25 for "
        "talk; or none."
    )
    add("--fps", type=frame_rate, help=text)
    add("--samples_per_video", type=int, default=1, help="Each with a start, crop and reference of its own.")
    text = "Stop if a larger share of the videos is too short, unreadable or without caption."
    add("--max_skipped_share", type=float, default=0.1, help=text)
    add("--latent_cache_dir", help="Where latents and embeddings are kept; <output_dir>/cache if not given.")
    add("--proportion_empty_prompts", type=float, default=0.0, help="Share of samples trained without prompt.")
    add("--max_sequence_length", type=int, default=512, help="Tokens of a prompt.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that read videos and the cache.")

    add = parser.add_argument_group("what films follow beside text; the preset sets what is not given").add_argument
    add("--condition", choices=tuple(PUBLISHED_SHARES), help="audio, as SVI-Talk, or pose, as SVI-Dance.")
    text = "Column of its files; found by its name if not given. Without one, audio is the sound in the videos."
    add("--condition_column", help=text)
    text = "Wav2Vec2 model that hears sounds: folder or Hub name. That of the model if not given."
    add("--audio_encoder", help=text)
    text = (
        "Modules for the condition: a file, folder or repository with them, or init for fresh ones. If not given, "
        "those in --init_lora, or those that the model has."
    )
    add("--condition_modules", help=text)
    text = "Sizes of fresh ones, such as audio_hidden_dim=64 audio_tokens=4 audio_token_dim=32, or pose_dim=8."
    add("--module_sizes", nargs="+", type=module_size, metavar="NAME=NUMBER", help=text)
    text = "Train them too, in full, beside the LoRA."
    add("--train_condition_modules", action="store_true", help=text)
    text = "Share of samples whose audio or pose is left out: 0.1 for audio, 0.145 for pose if not given."
    add("--p_no_condition", type=float, help=text)
    text = "Share of samples without image, which take no errors on it: 0.1 for pose, 0 for audio if not given."
    add("--p_no_image", type=float, help=text)

    add = parser.add_argument_group("scheme; the preset sets what is not given").add_argument
    text = (
        "shot: SVI-Shot. film: SVI-Film. film-2.0: SVI 2.0 on Wan 2.1. talk: SVI-Talk. dance: SVI-Dance. pro: SVI 2.0 "
        "Pro. ti2v-5b: held latents. none: no errors at all, plain LoRA tuning; the control."
    )
    add("--preset", choices=tuple(PRESETS), default="shot", help=text)
    add("--conditioning", choices=("pixel", "latent", "held"), help="PixelMotion, LatentMotion or HeldLatents.")
    add("--padding", choices=("zeros", "reference"), help="PixelMotion: what fills the rest of the condition.")
    add("--num_motion_frames", type=int, help="PixelMotion: frames carried from clip to clip.")
    text = "PixelMotion: frames of the padding that repeat the reference; 0: none, -1: all. Comes before --padding."
    add("--ref_pad_num", type=int, help=text)
    text = "PixelMotion: repeat the frame that a film begins with in place of the frames carried."
    add("--repeat_first_frame", action="store_true", help=text)
    text = "PixelMotion: what the mask marks, the first frame, as published, or all condition frames."
    add("--mask_frames", choices=("first", "all"), default="first", help=text)
    add("--ref_pad_cfg", dest="mask_frames", action="store_const", const="all", help="As --mask_frames all.")
    add("--num_motion_latents", "--num_motion_latent", type=int, default=1, help="Latents carried.")
    text = "Share of samples that go on from another clip; the others have the condition of a first clip."
    add("--p_motion", "--p_motion_threshold", type=float, help=text)
    add("--p_text_start", type=float, help="HeldLatents: share of batches that hold nothing (text to video).")
    text = "What the image encoder of Wan 2.1 sees of a frame: all of it, squeezed, or the square in the middle."
    add("--clip_resize", choices=("squash", "crop"), default="squash", help=text)
    text = "Where the reference frame is taken from: any frame of the clip, never one of it, or one before it."
    add("--reference", choices=("inside", "outside", "before"), help=text)
    names = ("--first_frame_augmentation", "--use_first_aug")
    add(*names, action=argparse.BooleanOptionalAction, help="Jitter, blur and sharpen them.")

    add = parser.add_argument_group("error recycling; the preset sets what is not given").add_argument
    add("--p_vid", "--latent_prob", "--svi_p_vid", "--latent_inject_prob", type=float, help="Errors on the latents.")
    text = "Noise levels whose samples take errors on the latents."
    add("--vid_sigmas", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help=text)
    text = "Those on the latents: of the bank, or the model's own of the very sample, for one more forward pass."
    add("--errors", choices=("bank", "self"), default="bank", help=text)
    text = "recycled: as published. restorative: EverAnimate's, which also leads flawed samples back."
    add("--objective", choices=("recycled", "restorative"), default="recycled", help=text)
    add("--p_img", "--y_prob", "--svi_p_img", "--context_inject_prob", type=float, help="Errors on the condition.")
    add("--p_noi", "--noise_prob", "--svi_p_noi", "--noise_inject_prob", type=float, help="Errors on the noise.")
    add("--p_clean", "--clean_prob", "--svi_p_clean", type=float, help="Share of samples without any error.")
    add("--n_img", "--y_error_num", type=int, help="Latent frames of the condition that take an error.")
    text = "With an anchor latent: whether it takes errors too. It has none at inference."
    add("--img_slots", choices=("motion", "all"), default="motion", help=text)
    ends = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add("--img_sigmas", default=(0.0, 1.0), help="Noise levels whose errors conditions take.", **ends)
    add("--img_scale", default=(1.0, 1.0), help="They are scaled by a random factor in this range.", **ends)
    text = "Every error is scaled by a random factor between 1 less this and 1 more."
    add("--error_modulate_factor", type=float, default=0.0, help=text)
    add("--num_grids", type=int, default=50, help="Grids of the error bank.")
    names = ("--bank_capacity", "--error_buffer_k", "--svi_max_errors_per_grid", "--buffer_size_per_bucket")
    add(*names, type=int, default=500, help="Errors a grid holds.")
    add("--bank_max_gb", type=float, help="Lowers the capacity to so many gigabytes a process.")
    add("--bank_dtype", choices=("float32", "bfloat16", "int8"), default="bfloat16", help="Of the errors it keeps.")
    add("--bank_path", help="Keep the bank in this file, mapped into memory. Each process adds its number.")
    text = "local: every process has a bank of its own, as published. sharded: one bank over all."
    add("--bank_mode", choices=("local", "sharded"), default="local", help=text)
    add(
        *("--bank_replacement", "--buffer_replacement_strategy", "--replacement_strategy"),
        type=lambda value: REPLACEMENT_ALIASES.get(value, value),
        choices=("l2", "random", "fifo"),
        default="l2",
        help="What a new error replaces in a full grid: the nearest, any, or the oldest.",
    )
    text = "What the nearest is nearest by: the residual r, or the error on the clean side, sigma * r."
    add("--bank_metric", choices=("residual", "clean"), default="residual", help=text)
    add("--clean_buffer_update_prob", type=float, default=0.1, help="Share of the clean samples that are banked.")
    text = "First steps in which every process banks the errors of all."
    add("--buffer_warmup_iter", "--svi_warmup_iter", type=int, default=50, help=text)

    add = parser.add_argument_group("training").add_argument
    add("--output_dir", "--output_path", required=True, help="Where the LoRA, checkpoints, logs and films go.")
    add("--seed", type=int, default=0, help="Of everything random.")
    add("--rank", "--lora_rank", type=int, default=128, help="Of the LoRA.")
    add("--lora_alpha", type=float, help="The rank if not given, so that the LoRA's scale is 1.")
    text = (
        "Layers it is for, such as to_q,to_k,ffn.0. If not given those that were published: all in attention and ffn."
    )
    add("--lora_layers", "--lora_target_modules", help=text)
    add("--lora_dropout", type=float, default=0.0, help="Share of its inputs that a step leaves out.")
    text = "LoRA to go on from, of the same rank: a file, or a folder or Hub repository with it."
    add("--init_lora", "--pretrained_lora_path", help=text)
    add("--init_lora_weight_name", help="The file in that folder or repository.")
    add("--train_batch_size", type=int, default=1, help="Samples a step and process.")
    names = ("--gradient_accumulation_steps", "--accumulate_grad_batches")
    add(*names, type=int, default=1, help="Batches a step.")
    add("--num_train_epochs", "--max_epochs", type=int, default=10, help="How often all samples are seen.")
    add("--max_train_steps", type=int, help="Instead of epochs; with --expert both of each.")
    text = "1e-4 if not given (the paper has 2e-5); for Prodigy, which finds its own, 1."
    add("--learning_rate", type=float, help=text)
    add("--scale_lr", action="store_true", help="Multiply it by the number of samples a step.")
    schedules = [scheduler.value for scheduler in SchedulerType if scheduler.value != "piecewise_constant"]
    add("--lr_scheduler", choices=schedules, default="constant", help="How it changes.")
    add("--lr_warmup_steps", type=int, default=0, help="Steps in which it rises.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Of polynomial.")
    add("--optimizer", type=str.lower, choices=OPTIMIZERS, default="adamw", help="Prodigy needs prodigyopt.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes.")
    add("--adam_beta1", type=float, default=0.9, help="Decay of the mean of gradients.")
    add("--adam_beta2", type=float, default=0.999, help="Decay of the mean of their squares.")
    add("--adam_weight_decay", type=float, default=1e-2, help="Of AdamW.")
    add("--adam_epsilon", type=float, default=1e-8, help="Of AdamW.")
    add(
        "--max_grad_norm",
        "--gradient_clip_val",
        type=float,
        default=1.0,
        help="Larger gradients are scaled down to it.",
    )
    text = "Hand over, and show in films, the moving average of the LoRA instead of its last step."
    add("--use_ema", action="store_true", help=text)
    add("--ema_decay", type=float, default=0.9999, help="Share of it that a step keeps, after a warm-up.")
    add("--flow_shift", "--sigma_shift", type=float, default=5.0, help="Of the training timesteps.")
    text = (
        "How often noise levels are drawn and what they count. svi: as published; the others as in diffusers' scripts."
    )
    add("--weighting_scheme", choices=SCHEMES, default="svi", help=text)
    add("--logit_mean", type=float, default=0.0, help="Of logit_normal.")
    add("--logit_std", type=float, default=1.0, help="Of logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Of mode.")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="What accelerate is configured for if not given.")
    names = ("--gradient_checkpointing", "--use_gradient_checkpointing")
    add(*names, action="store_true", help="Less memory for more computing.")
    text = "Compile the blocks of the transformer, all by one: the first step takes longer, the others less."
    add("--compile", action="store_true", help=text)
    add("--allow_tf32", action="store_true", help="Faster float32 products on NVIDIA GPUs.")

    add = parser.add_argument_group("checkpoints, logs, validation").add_argument
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Keep so many of the last checkpoints.")
    add("--resume_from_checkpoint", help='"latest", or a checkpoint folder: go on, bit for bit as if never stopped.')
    add("--report_to", default="tensorboard", help="tensorboard, wandb, trackio, all or none.")
    add("--tracker_name", default="svi-erft", help="Name of the project there.")
    add("--logging_dir", default="logs", help="Folder in `output_dir` for them.")
    add("--validation_prompt", nargs="+", help="Prompts of a film, one a clip, made with the LoRA so far.")
    add("--validation_image", help="Its start image: file or URL.")
    add(
        "--num_validation_clips", type=int, help="Clips of the film; the last prompt holds. One a prompt if not given."
    )
    add("--validation_condition", help="With --condition: the sound or the poses that it follows.")
    add("--validation_steps", type=int, help="Make it every so many steps; it is always made at the end.")
    add("--validation_epochs", type=int, help="Instead of steps.")
    add("--validation_inference_steps", type=int, default=50, help="Steps in which a clip is made.")
    add("--validation_guidance_scale", type=float, default=5.0, help="Weight of the prompt.")
    text = "original: beside diffusers' layout, a file for ComfyUI and the authors' loader."
    add("--export_format", choices=("diffusers", "original"), default="diffusers", help=text)
    add("--export_dtype", choices=("float32", "bfloat16"), default="float32", help="Of the finished weights alone.")
    text = "Lower rank of the finished weights, by singular value decomposition. Films show the trained one."
    add("--export_rank", type=int, help=text)
    add("--push_to_hub", action="store_true", help="Push LoRA, model card and film to the Hub.")
    add("--hub_model_id", help="Repository there; the name of `output_dir` if not given.")
    add("--hub_token", help="Token for it; that of `hf auth login` if not given.")

    elsewhere = explain(sys.argv[1:] if arguments is None else arguments)
    if elsewhere:
        parser.exit(2, "\n".join((f"{parser.prog}: error: options that are not known here:", *elsewhere, "")))
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.condition:
        for name, value in zip(("p_no_condition", "p_no_image"), PUBLISHED_SHARES[args.condition], strict=True):
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.lora_alpha is None:
        args.lora_alpha = args.rank
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.optimizer]
    try:
        set_size(args)
        check_args(args)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return args


def set_size(args: argparse.Namespace) -> None:
    """Where size and length are not given: those of the first bucket, or the defaults."""
    check_buckets(vars(args))
    if args.buckets:
        num_frames = SIZE["num_frames"] if args.num_frames is None else args.num_frames
        args.buckets = read_buckets(args.buckets, num_frames)
        args.width, args.height, args.num_frames = map(int, args.buckets[0].split("x"))
    for name, value in SIZE.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is loaded."""
    if bool(args.train_data_dir) == bool(args.dataset_name):
        given = "both" if args.train_data_dir else "none"
        raise ValueError(f"Give one of `--train_data_dir` and `--dataset_name`, got {given}.")
    if args.dataset_config_name and args.train_data_dir:
        raise ValueError(f"`--dataset_config_name`={args.dataset_config_name} is for `--dataset_name`: leave it out.")
    if args.revision and os.path.isdir(args.pretrained_model_name_or_path):
        raise ValueError(
            f"`--revision`={args.revision} is of a repository, but `--pretrained_model_name_or_path` is a folder."
        )
    check_ranges(vars(args))
    check_combinations(vars(args))
    check_condition_options(vars(args))
    if args.export_rank is not None and not 1 <= args.export_rank <= args.rank:
        raise ValueError(
            f"`--export_rank` can only lower the rank: it must be between 1 and {args.rank}, got {args.export_rank}."
        )
    if args.p_text_start and args.conditioning != "held":
        raise ValueError(f"`--p_text_start`={args.p_text_start} needs `--conditioning held`, got {args.conditioning}.")
    if args.conditioning != "pixel" and args.reference != "before":
        raise ValueError(
            f"`--reference`={args.reference}: the anchor of `--conditioning {args.conditioning}` comes from before "
            "the clip, as at inference. Use `--reference before`."
        )
    for name in ("num_motion_frames", "padding"):
        value = getattr(args, name)
        if args.conditioning != "pixel" and value != PRESETS[args.preset][name]:
            raise ValueError(f"`--{name}`={value} is for `--conditioning pixel`, got {args.conditioning}.")
    if (args.validation_prompt is None) != (args.validation_image is None):
        raise ValueError("A validation film needs both `--validation_prompt` and `--validation_image`.")
    image = args.validation_image
    if image and not image.startswith("http") and not os.path.isfile(image):
        raise ValueError(f"`--validation_image`={image!r} is not a file.")
    if args.quantize_base:
        check_quantization(args.quantize_base)
    if args.expert == "both" and args.init_lora and os.path.isfile(args.init_lora):
        names = " and ".join(map(weight_name, EXPERTS))
        raise ValueError(
            f"`--init_lora`={args.init_lora} is one file, but `--expert both` begins with two: give the folder that "
            f"has {names}."
        )
    if args.report_to == "wandb" and args.hub_token is not None:
        raise ValueError("`--hub_token` would be logged by wandb: use `hf auth login` instead.")
    check_trackers(args.report_to)
    check_optimizer(args.optimizer, args.use_8bit_adam)
    parse_layers(args.lora_layers)
    make_injection(args)
    make_layouts(args, make_scheme(args))


def make_scheme(args: argparse.Namespace) -> Scheme:
    if args.conditioning == "pixel":
        padding, count = args.padding, args.ref_pad_num
        if count is not None:
            if count < -1:
                raise ValueError(
                    f"`--ref_pad_num` must be -1 for all, 0 for none, or a number of frames, got {count}."
                )
            padding, count = ("reference" if count else "zeros"), (count if count not in (0, -1) else None)
        return PixelMotion(
            num_frames=args.num_motion_frames,
            padding=padding,
            num_references=count,
            repeat_first=args.repeat_first_frame,
            mask_frames=args.mask_frames,
        )
    if args.ref_pad_num is not None or args.repeat_first_frame or args.mask_frames != "first":
        raise ValueError(
            "`--ref_pad_num`, `--repeat_first_frame` and `--mask_frames` are for `--conditioning pixel`, got "
            f"{args.conditioning}."
        )
    return {"latent": LatentMotion, "held": HeldLatents}[args.conditioning](num_latents=args.num_motion_latents)


def make_injection(args: argparse.Namespace) -> InjectionConfig:
    anchored = args.conditioning != "pixel" and args.img_slots == "motion"
    return InjectionConfig(
        p_vid=args.p_vid,
        vid_sigmas=tuple(args.vid_sigmas),
        p_noi=args.p_noi,
        p_img=args.p_img,
        p_clean=args.p_clean,
        n_img=args.n_img,
        first_img=1 if anchored else 0,
        # Held latents are given, not predicted: there are no errors on them.
        first_error=1 + args.num_motion_latents if args.conditioning == "held" else 0,
        img_sigmas=tuple(args.img_sigmas),
        img_scale=tuple(args.img_scale),
        modulation=args.error_modulate_factor,
    )


def hands_modules_over(args: argparse.Namespace) -> bool:
    """Whether the modules lie in the file of the LoRA: those for poses, which are small, in any case."""
    return args.train_condition_modules or args.condition == "pose"


def film_fps(args: argparse.Namespace) -> int:
    return 16 if args.fps == "none" else args.fps


def make_layouts(args: argparse.Namespace, scheme: Scheme) -> list[SampleLayout]:
    """What samples consist of: of every bucket, or of all."""
    buckets = args.buckets or [f"{args.width}x{args.height}x{args.num_frames}"]
    return [
        SampleLayout(
            num_frames=num_frames,
            height=height,
            width=width,
            # source: issue 75 of the authors' repository; the first 1 + 4m frames of the clip re-tell the end of it
            history=0 if scheme.carried_frames else num_frames - scheme.overlap,
            reference=args.reference,
            augment=args.first_frame_augmentation,
            condition_frames=max(1, scheme.carried_frames),
            center_crop=args.center_crop,
            random_flip=args.random_flip,
            fps=None if args.fps == "none" else args.fps,
        )
        for width, height, num_frames in (map(int, bucket.split("x")) for bucket in buckets)
    ]


# 2. Data and models


def find_samples(args: argparse.Namespace, layouts: list[SampleLayout]) -> Samples:
    """Samples of all usable videos, each of the bucket that the video goes to."""
    columns = {"video_column": args.video_column, "caption_column": args.caption_column}
    columns |= {"condition": args.condition, "condition_column": args.condition_column}
    if args.train_data_dir:
        candidates = open_folder(args.train_data_dir, **columns)
    else:
        candidates = open_dataset(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, **columns)
    videos, skipped = usable_videos(candidates, layouts, args.max_skipped_share)
    if skipped:
        logger.warning(skipped.describe())
    chosen = [choose_bucket(video, layouts) for video in videos]
    if args.buckets:
        logger.info(describe_buckets(chosen, layouts))
    return Samples(videos, chosen, args.seed, args.samples_per_video)


def find_condition(
    args: argparse.Namespace, folder: Path, base: dict, in_lora: dict[str, torch.Tensor] | None, device: torch.device
) -> TrainedCondition | None:
    """What films follow beside text, if anything, for a transformer with the config `base`."""
    if args.condition is None:
        return None
    encoder = folder / "audio_encoder" if (folder / "audio_encoder").is_dir() else None
    if args.audio_encoder:
        encoder = Path(args.audio_encoder)
        if not encoder.is_dir():
            encoder = download_model(args.audio_encoder, audio_encoder_revision(args.audio_encoder), args.cache_dir)
    return TrainedCondition(
        args.condition,
        base,
        fps=None if args.fps == "none" else args.fps,
        audio_encoder=encoder if args.condition == "audio" else None,
        device=device,
        source=args.condition_modules,
        sizes=args.module_sizes and dict(args.module_sizes),
        in_lora=in_lora,
        cache_dir=args.cache_dir,
        train_modules=args.train_condition_modules,
        p_no_condition=args.p_no_condition,
        p_no_image=args.p_no_image,
    )


def load_pipeline(
    args: argparse.Namespace, folder: Path, accelerator: Accelerator, **components: torch.nn.Module | None
) -> SVIPipeline:
    """The pipeline with `components` instead of its own, on this process's device."""
    weight_dtype = WEIGHT_DTYPES[accelerator.mixed_precision]
    dtypes = {"vae": torch.float32, "image_encoder": torch.float32, "default": weight_dtype}
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        # Under ZeRO-3 transformers would deal its models out to the processes.
        unset_hf_deepspeed_config()
    try:
        kind = PIPELINES[args.condition] if args.condition else SVIPipeline
        pipe = kind.from_pretrained(folder, dtype=dtypes, variant=args.variant, **components)
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()
    if args.enable_tiling:
        pipe.vae.enable_tiling()
    if not args.offload:
        return pipe.to(accelerator.device)
    for transformer in filter(None, (pipe.transformer, pipe.transformer_2)):
        transformer.to(accelerator.device)
    offload_encoders(pipe, accelerator.device)
    return pipe


# 3. Error recycling


def training_timesteps(args: argparse.Namespace, boundary: float | None) -> torch.Tensor:
    """Indices into the 1000 training noise levels to draw from, with an expert those on its side of the boundary."""
    pool = timestep_pool(args.weighting_scheme, TRAIN_TIMESTEPS, args.logit_mean, args.logit_std, args.mode_scale)
    if args.expert is None:
        return pool
    sigmas = shifted_sigmas(TRAIN_TIMESTEPS, args.flow_shift)[pool]
    of_expert = pool[(sigmas >= boundary) == (args.expert == "high")]
    if not len(of_expert):
        raise ValueError(
            f"`--weighting_scheme {args.weighting_scheme}` draws no noise level of the {args.expert}-noise expert."
        )
    return of_expert


def make_banks(
    args: argparse.Namespace,
    accelerator: Accelerator,
    error_shapes: list[tuple[int, ...]],
    timesteps: torch.Tensor,
    taken: int,
) -> list[ErrorBank]:
    """The banks of this process, one a shape, for the noise levels that `timesteps` are the indices of.

    `taken` bytes are those of the other expert's banks.
    """
    grids = shifted_sigmas(args.num_grids, args.flow_shift)
    rank, on_this_machine = accelerator.process_index, get_int_from_env(LOCAL_PROCESSES, 1)
    config = BankConfig(
        num_grids=args.num_grids,
        capacity=args.bank_capacity,
        replacement=args.bank_replacement,
        metric=args.bank_metric,
        dtype=args.bank_dtype,
        byte_budget=None if args.bank_max_gb is None else int(args.bank_max_gb * 1e9),
        path=args.bank_path and f"{args.bank_path}.{rank}",
    )
    if args.bank_mode == "sharded" and accelerator.num_processes > 1:
        own = len(range(rank, args.num_grids, accelerator.num_processes))
        configs = config.shared_by(error_shapes, own, taken, on_this_machine)
        return [
            ShardedErrorBank(shape, grids, config_of_shape, accelerator.device)
            for shape, config_of_shape in zip(error_shapes, configs, strict=True)
        ]
    # An expert never meets the grids of the other.
    reached = reached_grids(shifted_sigmas(TRAIN_TIMESTEPS, args.flow_shift)[timesteps], grids)
    configs = config.shared_by(error_shapes, len(reached), taken, on_this_machine)
    return [
        ErrorBank(shape, grids, config_of_shape, owned=reached)
        for shape, config_of_shape in zip(error_shapes, configs, strict=True)
    ]


def make_recycler(
    args: argparse.Namespace,
    accelerator: Accelerator,
    error_shapes: list[tuple[int, ...]],
    timesteps: torch.Tensor,
    taken: int = 0,
) -> ErrorRecycler:
    """The recycler of this process; with banks as of [`make_banks`] where it injects errors of a bank."""
    injection = make_injection(args)
    recycler_config = RecyclerConfig(
        clean_buffer_update_prob=args.clean_buffer_update_prob, buffer_warmup_iter=args.buffer_warmup_iter
    )
    banks = []
    if injection.draws(banked=args.errors == "bank"):
        banks = make_banks(args, accelerator, error_shapes, timesteps, taken)
    return ErrorRecycler(banks, injection, recycler_config, args.seed * 1000 + accelerator.process_index)


@dataclass
class TrainingStep:
    """What is done with a batch: errors are injected, the model predicts, and the errors it makes are banked."""

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
    times: StepTimes
    dropout: ConditionDropout | None = None

    def __post_init__(self):
        self.sigmas = shifted_sigmas(TRAIN_TIMESTEPS, self.args.flow_shift)
        self.weights = timestep_weights(self.args.weighting_scheme, TRAIN_TIMESTEPS, self.args.flow_shift)
        self.alphas = restoration_weights(TRAIN_TIMESTEPS, self.args.flow_shift)
        if self.args.objective == "recycled":
            self.alphas = torch.zeros_like(self.alphas)
        scheme = make_scheme(self.args)
        self.known_frames = torch.tensor([scheme.known_frames(is_first) for is_first in (True, False)])

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of a batch, `(batch,)`, and which of its samples were left clean."""
        latents, generator = batch["latents"], self.generator
        condition, image_embeds, known_frames = self.choose_condition(batch)
        prompt_embeds = self.choose_prompt(batch)
        followed, no_image = None, None
        if self.dropout:
            followed, no_image = self.dropout.choose(batch, generator)
            condition, known_frames = blank(no_image, condition), blank(no_image, known_frames)
            image_embeds = None if image_embeds is None else blank(no_image, image_embeds)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        picks = self.timesteps[torch.randint(len(self.timesteps), (len(latents),), generator=generator)]
        sigmas, weights, alphas = (
            values[picks].to(latents.device).float() for values in (self.sigmas, self.weights, self.alphas)
        )
        given = (sigmas, prompt_embeds, image_embeds, known_frames, followed)

        with self.times.part("inject"):
            own = None
            if self.args.errors == "self":
                with torch.no_grad():
                    predicted = self.predict(interpolate(latents, noise, sigmas), condition, *given)
                own = self_error(predicted, latents, noise, sigmas)
            injected = self.recycler.inject(latents, noise, condition, sigmas, own)
        if no_image is not None:
            # Where there is no image there are no errors on it.
            injected = injected._replace(condition=blank(no_image, injected.condition))
        noisy = interpolate(injected.latents, injected.noise, sigmas)
        with self.times.part("forward"):
            prediction = self.predict(noisy, injected.condition, *given)

        target = restorative_velocity(latents, injected.latents, injected.noise, sigmas, alphas)
        residual, mask = prediction - target, None
        if self.expand_timesteps:
            mask = torch.ones_like(target[:1, :1, :, :1, :1])
            mask[:, :, : condition.shape[2]] = 0
            residual = residual * mask
        with self.times.part("bank"):
            self.recycler.recycle(residual, sigmas, injected.switches)
        return erft_loss(prediction, target, weights, mask), injected.switches.clean

    def predict(
        self,
        noisy: torch.Tensor,
        condition: torch.Tensor,
        sigmas: torch.Tensor,
        prompt_embeds: torch.Tensor,
        image_embeds: torch.Tensor | None,
        known_frames: torch.Tensor,
        followed: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The velocity, of the shape of `noisy`."""
        hidden_states, timesteps = transformer_inputs(
            noisy, condition, sigmas, self.patch_size, self.expand_timesteps, known_frames
        )
        return self.transformer(
            hidden_states=hidden_states.to(self.weight_dtype),
            timestep=timesteps,
            encoder_hidden_states=prompt_embeds.to(self.weight_dtype),
            encoder_hidden_states_image=None if image_embeds is None else image_embeds.to(self.weight_dtype),
            attention_kwargs=followed,
            return_dict=False,
        )[0].float()

    def choose_condition(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Condition latents, image embeddings, and the frames that the mask marks, `(batch,)`, of a batch.

        In part of its samples they are those of a first clip.
        """
        args, condition, image_embeds = self.args, batch["condition"], batch.get("image_embeds")
        first, text = torch.rand(2, len(condition), generator=self.generator, dtype=torch.float64)
        goes_on = first < args.p_motion
        known_frames = self.known_frames[goes_on.long()]
        if args.conditioning == "held":
            # Held latents stand in for the first of a clip: a batch has as many of them throughout.
            if text[0] < args.p_text_start:
                return condition[:, :, :0], image_embeds, known_frames
            return batch["condition" if goes_on[0] else "first_condition"], image_embeds, known_frames
        if args.p_motion == 1:
            return condition, image_embeds, known_frames
        goes_on = goes_on.to(condition.device)
        condition = torch.where(goes_on.view(-1, 1, 1, 1, 1), condition, batch["first_condition"])
        if image_embeds is not None:
            image_embeds = torch.where(goes_on.view(-1, 1, 1), image_embeds, batch["first_image_embeds"])
        return condition, image_embeds, known_frames

    def choose_prompt(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Prompt embeddings of a batch, some of them empty."""
        embeds, share = batch["prompt_embeds"], self.args.proportion_empty_prompts
        if not share:
            return embeds
        dropped = torch.rand(len(embeds), generator=self.generator) < share
        return torch.where(dropped.to(embeds.device).view(-1, 1, 1), self.no_prompt.to(embeds), embeds)


# 4. Validation and what is handed over


@torch.no_grad()
def log_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: SVIPipeline,
    scheme: Scheme,
    step: int,
    pair: Pair | None = None,
    followed: dict[str, Rows] | None = None,
) -> tuple[Path, dict[str, list[float]]] | None:
    """A film of `validation_prompt`, by the pipeline that will use the LoRA, and how it drifts; main process only."""
    pipe.set_progress_bar_config(desc=f"Film at step {step}", leave=False)
    pipe.scheduler = SVIEulerScheduler.from_config(pipe.scheduler.config, shift=args.flow_shift)
    with accelerator.autocast():
        clips = [
            clip.frames
            for clip in pipe.stream(
                image=load_image(args.validation_image),
                prompts=args.validation_prompt,
                num_clips=args.num_validation_clips or len(args.validation_prompt),
                conditioning=scheme,
                height=args.height,
                width=args.width,
                num_frames=args.num_frames,
                num_inference_steps=args.validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                negative_prompt=NEGATIVE_PROMPT,
                clip_resize=args.clip_resize,
                max_sequence_length=args.max_sequence_length,
                generator=torch.Generator().manual_seed(args.seed),
                **(followed or {}),
            )
        ]
    if not accelerator.is_main_process:
        return None
    # The two experts may be trained into one folder, or repository.
    of_expert = f"{args.expert}_noise" if args.expert and pair is None else ""
    path = Path(args.output_dir) / "validation" / of_expert / f"step-{step}.mp4"
    is_sound = args.condition == "audio" and Path(args.validation_condition).suffix not in ROW_FILES
    figures = save_film(path, clips, film_fps(args), args.validation_condition if is_sound else None)
    step = sum(pair.steps.values()) if pair else step
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            strip = np.asarray(PIL.Image.open(path.with_suffix(".png")))
            tracker.writer.add_image("validation", strip, step, dataformats="HWC")
        elif tracker.name in ("wandb", "trackio"):
            module = __import__(tracker.name)
            tracker.log({"validation": module.Video(str(path), format="mp4")}, step=step)
    accelerator.log({f"validation/{name}": values[-1] for name, values in figures.items()}, step=step)
    return path.relative_to(args.output_dir), figures


def save_model_card(
    args: argparse.Namespace, scheme: Scheme, repo_id: str, validation: tuple[Path, dict[str, list[float]]] | None
) -> None:
    film, figures = validation or (None, None)
    lora = TrainedLora(
        base_model=args.pretrained_model_name_or_path,
        scheme=scheme,
        method="by error recycling"
        if make_injection(args).draws(banked=True)
        else "by plain tuning on clean conditions, the control of error recycling",
        settings={name: getattr(args, name) for name in CARD_SETTINGS}
        | {
            "fps": film_fps(args),
            "buckets": args.buckets and " ".join(args.buckets),
            "ema_decay": args.ema_decay if args.use_ema else None,
        },
        expert=args.expert,
        condition=args.condition,
        has_modules=hands_modules_over(args),
        film=film and film.as_posix(),
        figures=figures,
    )
    lora.save(args.output_dir)
    write_model_card(args.output_dir, repo_id, args.expert)


# 5. The run


def make_accelerator(args: argparse.Namespace) -> Accelerator:
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        # The others wait while one makes a film, and after ten minutes NCCL would end them.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO,
    )
    logger.info(accelerator.state, main_process_only=False)
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    with own_folder("--output_dir", args.output_dir) if accelerator.is_main_process else nullcontext():
        if args.expert == "both":
            take_turns(both_experts(args, accelerator))
        else:
            take_turns({"": train(args, accelerator)})
        accelerator.end_training()


def both_experts(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Iterator[int]]:
    """The training that each expert would have alone, to take turns; each has a folder for its checkpoints."""
    if accelerator.state.deepspeed_plugin is not None:
        raise ValueError(
            "`--expert both` is not for DeepSpeed, of which accelerate has one engine in a process: train them one "
            "after the other, `--expert high` and `--expert low`."
        )
    if of_one := list_checkpoints(args.output_dir):
        raise ValueError(
            f"{args.output_dir} has checkpoints of a run with one expert, {', '.join(path.name for path in of_one)}: "
            "with `--expert both` each has a folder. Move them to high_noise or low_noise in it, whichever they are "
            "of, and they are gone on from; or give another `--output_dir`."
        )
    pair = Pair()
    for expert in EXPERTS:
        pair.args[expert] = argparse.Namespace(
            **{
                **vars(args),
                "expert": expert,
                "bank_path": args.bank_path and f"{args.bank_path}-{expert}",
                "init_lora_weight_name": weight_name(expert) if args.init_lora else None,
            }
        )
    # Each prepares and saves its own.
    accelerators = {"high": accelerator, "low": make_accelerator(args)}
    return {expert: train(pair.args[expert], accelerators[expert], pair) for expert in EXPERTS}


def train(args: argparse.Namespace, accelerator: Accelerator, pair: Pair | None = None) -> Iterator[int]:
    """Train one transformer. In a `pair` it pauses, at the step it yields, before the first one and after a turn."""
    output_dir, weight_dtype = Path(args.output_dir), WEIGHT_DTYPES[accelerator.mixed_precision]
    # What is wanted, against what was begun
    launched = {"mixed_precision": accelerator.mixed_precision, "zero_stage": zero_stage(accelerator)}
    check_beside_zero(vars(args), zero_stage(accelerator))
    arguments = describe_arguments({**vars(args), **launched})
    arguments_file = output_dir / ("arguments.json" if args.expert is None else f"arguments_{args.expert}_noise.json")
    checkpoints_dir = output_dir / f"{args.expert}_noise" if pair else output_dir
    resumed = find_checkpoint(checkpoints_dir, args.resume_from_checkpoint, accelerator.num_processes)
    where, begun = (resumed[0], resumed[1].run) if resumed else (arguments_file, read_run(arguments_file))
    if resumed:
        check_steps(resumed[1].step, args.max_train_steps)
    changes = compare_arguments(begun["arguments"], arguments, str(where)) if begun else []
    if resumed:
        for change in changes:
            logger.warning(f"Going on, though {change}.")
    elif begun:
        logger.warning(f"{output_dir} has a LoRA of an earlier run: it will be replaced.")

    if args.bank_path:
        check_file_writable("--bank_path", f"{args.bank_path}.{accelerator.process_index}")
    check_writable("--latent_cache_dir", args.latent_cache_dir or output_dir / "cache")

    # The model's settings
    folder = Path(args.pretrained_model_name_or_path)
    if not folder.is_dir():
        with accelerator.main_process_first():
            folder = download_model(args.pretrained_model_name_or_path, args.revision, args.cache_dir)
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"`--pretrained_model_name_or_path`={folder} has no model_index.json: is it in diffusers' layout?"
        )
    index = json.loads((folder / "model_index.json").read_text())
    expand_timesteps = bool(index.get("expand_timesteps"))
    has_experts = (index.get("transformer_2") or [None])[0] is not None
    if has_experts != (args.expert is not None):
        raise ValueError(
            "This model has two experts: choose one with `--expert high` or `--expert low`, or `--expert both`."
            if has_experts
            else f"`--expert {'both' if pair else args.expert}`: this model has only one transformer."
        )
    subfolder = "transformer_2" if args.expert == "low" else "transformer"
    scheme = make_scheme(args)
    layouts = make_layouts(args, scheme)
    for layout in layouts:
        scheme.check(layout.num_frames, expand_timesteps)
    init_lora, in_lora = None, None
    if args.init_lora:
        init_lora, in_lora = read_init_lora(
            args.init_lora, args.init_lora_weight_name, args.rank, args.lora_alpha, args.cache_dir, args.condition
        )
    base_config = WanTransformer3DModel.load_config(folder, subfolder=subfolder)
    condition = find_condition(args, folder, base_config, in_lora, accelerator.device)
    repo_id = args.hub_model_id or output_dir.name
    if accelerator.is_main_process and args.push_to_hub:
        # Of a pair both are replaced, whatever is there.
        repo_id = open_repo(repo_id, output_dir, scheme, None if pair else args.expert, args.hub_token)
    accelerator.wait_for_everyone()

    # Error recycling
    timesteps = training_timesteps(args, index.get("boundary_ratio"))
    vae = AutoencoderKLWan.load_config(folder, subfolder="vae")
    # Published configurations of Wan 2.1 leave out what is the default.
    factor = vae.get("scale_factor_spatial", 8)
    patch_size = tuple(base_config.get("patch_size", (1, 2, 2)))
    for name, patch in (("height", patch_size[1]), ("width", patch_size[2])):
        for layout in layouts:
            if getattr(layout, name) % (factor * patch):
                option = f"`--buckets` {bucket_name(layout)}: the {name}" if args.buckets else f"`--{name}`"
                raise ValueError(
                    f"{option} must be a multiple of {factor * patch} for this model, got {getattr(layout, name)}."
                )
    if args.condition == "pose" and factor != 8:
        raise ValueError(
            f"`--condition pose`: the modules make tokens for latents of an eighth of the film, but the VAE of this "
            f"model makes them a {factor}th."
        )
    latents_shapes = [
        (vae.get("z_dim", 16), num_latent_frames(layout.num_frames), layout.height // factor, layout.width // factor)
        for layout in layouts
    ]
    taken = sum(bank.bytes_to_come() for other in (pair.recyclers if pair else []) for bank in other.banks.values())
    recycler = make_recycler(args, accelerator, latents_shapes, timesteps, taken)

    # Data: what the encoders make of the samples
    samples, keys = (pair and pair.samples) or find_samples(args, layouts), None
    cache = TensorCache(args.latent_cache_dir or output_dir / "cache")
    followed = {}
    if condition:
        if args.validation_prompt:
            clips = args.num_validation_clips or len(args.validation_prompt)
            size = (args.height, args.width, args.num_frames)
            followed = condition.open_film(args.validation_condition, clips, scheme, *size)
        keys = condition.encode(samples, cache, args.dataloader_num_workers)
    run = {"arguments": arguments, "content": describe_content(folder, subfolder, samples, keys)}
    if resumed:
        compare_content(begun["content"], run["content"], str(where))
    dataset, no_prompt = encode_samples(
        samples,
        scheme,
        cache,
        lambda: load_pipeline(args, folder, accelerator, transformer=None, transformer_2=None),
        " ".join(filter(None, (fingerprint_encoders(folder), args.variant, args.enable_tiling and "tiled"))),
        text_dtype=weight_dtype,
        max_sequence_length=args.max_sequence_length,
        first_clips=args.p_motion < 1,
        clip_resize=args.clip_resize,
        num_workers=args.dataloader_num_workers,
    )

    if condition:
        dataset = CachedSamples(cache, [(*parts, key) for parts, key in zip(dataset.keys, keys, strict=True)])

    # The transformer and its LoRA, which begins with the same random numbers whatever was encoded before
    set_seed(args.seed)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=(without_modules if condition else list)(parse_layers(args.lora_layers)),
    )
    transformer = load_transformer(
        folder,
        subfolder,
        weight_dtype,
        config,
        init_lora,
        args.quantize_base,
        args.variant,
        **(condition.beside_lora(dataset) if condition else {}),
    )
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    blocks = None
    if args.group_offload:
        blocks = BlockOffload(transformer, accelerator.device)
    elif zero_stage(accelerator) == 3:
        deal_out(transformer, accelerator, weight_dtype)
    elif args.quantize_base not in BITSANDBYTES:
        transformer.to(accelerator.device)
    if args.compile:
        transformer.compile_repeated_blocks()
    config = next(iter(transformer.peft_config.values()))

    def write_lora(file: Path, state_dict: dict[str, torch.Tensor], layout: str = "diffusers") -> None:
        if not all_finite(state_dict.values()):
            raise FloatingPointError(f"The LoRA is not finite any more: {file} is not written.")
        modules = {name: value for name, value in state_dict.items() if ".lora_" not in name}
        state_dict = {name: value for name, value in state_dict.items() if name not in modules}
        # What loads it would drop out inputs too: layers that are added to a model are in training mode.
        used = replace(config, lora_dropout=0.0)
        save_lora(file, state_dict, used, scheme, args.expert, layout, args.clip_resize, args.condition, modules)

    def trained_state_dict(model: torch.nn.Module, rank: int | None = None) -> dict[str, torch.Tensor]:
        """The LoRA and the modules that are handed over with it."""
        state_dict = lora_state_dict(accelerator, model, rank)
        return state_dict | (modules_to_save(unwrap(accelerator, model)) if hands_modules_over(args) else {})

    def save_model_hook(models, weights, folder):
        state_dict = trained_state_dict(models[0])
        if accelerator.is_main_process:
            write_lora(Path(folder) / LORA_NAME, state_dict)
        if weights:
            weights.pop()

    def load_model_hook(models, folder):
        # DeepSpeed has loaded its own, LoRA included.
        if models:
            saved, model = read_lora(folder, LORA_NAME), unwrap(accelerator, models.pop())
            state_dict = {name.removeprefix("transformer."): value for name, value in saved.state_dict.items()}
            set_peft_model_state_dict(model, state_dict)
            if saved.modules:
                load_modules(model, saved.modules)

    accelerator.register_save_state_pre_hook(save_model_hook)
    accelerator.register_load_state_pre_hook(load_model_hook)

    # Optimizer, data loader, learning rate
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    learning_rate = args.learning_rate * (batch_size if args.scale_lr else 1)
    optimizer = make_optimizer(
        args.optimizer,
        parameters,
        learning_rate,
        eight_bit=args.use_8bit_adam,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
    )
    data_generator = torch.Generator().manual_seed(args.seed)
    dataloader = DataLoader(
        dataset,
        batch_sampler=BucketBatchSampler(
            RandomSampler(dataset, generator=data_generator),
            [bucket_name(samples.layout(index)) for index in range(len(samples))],
            args.train_batch_size,
            accelerator.num_processes,
        ),
        num_workers=args.dataloader_num_workers,
        generator=data_generator,
    )
    # Batches are dealt out to the processes; the scheduler counts those of all.
    batches = len(dataloader) // accelerator.num_processes
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    args.max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    transformer, optimizer, dataloader, lr_scheduler = accelerator.prepare(
        transformer, optimizer, dataloader, lr_scheduler
    )
    assert len(dataloader) == batches
    if resumed:
        check_steps(resumed[1].step, args.max_train_steps)

    # The step
    assert dataset[0]["latents"].shape in latents_shapes
    generator = torch.Generator().manual_seed(args.seed * 1000 + 500 + accelerator.process_index)
    times = StepTimes(accelerator.device)
    training_step = TrainingStep(
        args,
        transformer,
        recycler,
        generator,
        timesteps,
        no_prompt,
        patch_size,
        expand_timesteps,
        weight_dtype,
        times,
        condition and condition.dropout,
    )

    # Resume
    averages = pair.averages if pair else []
    if args.use_ema:
        averages.append(MovingAverage(parameters, args.ema_decay))
        accelerator.register_for_checkpointing(averages[-1])
    average = averages[-1] if averages else None
    checkpoints = Checkpoints(checkpoints_dir, accelerator, recycler, generator, args.checkpoints_total_limit, run)
    global_step = 0
    if resumed:
        global_step = checkpoints.resume(str(resumed[0]))
        apply_learning_rate(lr_scheduler.scheduler, learning_rate)
    first_step = global_step
    if pair and pair.trackers:
        accelerator.trackers = pair.trackers
    elif accelerator.is_main_process and accelerator.log_with:
        told = {**vars(args), "expert": "both"} if pair else vars(args)
        values = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in told.items()}
        accelerator.init_trackers(args.tracker_name, config={k: v for k, v in values.items() if k != "hub_token"})

    if pair:
        # Before any step, what is wrong with the other is to show.
        model = unwrap(accelerator, transformer)
        pair.transformers[subfolder], pair.steps[args.expert] = model, global_step
        pair.samples, pair.trackers = samples, accelerator.trackers
        pair.recyclers.append(recycler)
        if blocks:
            pair.blocks.append(blocks)
        # Not every quantized base can be moved, and of one in blocks only these are.
        model_to_move = None if args.quantize_base or args.group_offload else model
        bring_back = put_by(model_to_move, optimizer.optimizer, blocks)
        yield global_step
        bring_back()

    # Train
    logger.info("***** Running training *****")
    if args.expert:
        logger.info(f"  Expert = {args.expert} noise")
    logger.info(f"  LoRA = rank {args.rank}, {num_parameters:,} parameters")
    logger.info(f"  Data = {len(dataset)} samples of {len(samples.videos)} videos")
    logger.info(f"  Steps = {args.max_train_steps} of {batch_size} samples")
    for description in (scheme, recycler.injection, *(bank.describe() for bank in recycler.banks.values())):
        logger.info(f"  {description}")
    progress = tqdm(
        total=args.max_train_steps,
        initial=global_step,
        desc=f"Steps of the {args.expert}-noise expert" if pair else "Steps",
        disable=not accelerator.is_local_main_process,
    )

    def validate() -> tuple[Path, dict[str, list[float]]] | None:
        """The film, and its figures, on the main process."""
        film, others = None, pair.others(subfolder) if pair else {}
        transformer.eval()
        for other in others.values():
            other.eval()
        # Under ZeRO-3 no process has all weights: they come together block by block, while all make the same film.
        if accelerator.is_main_process or zero_stage(accelerator) == 3:
            trained = {subfolder: unwrap(accelerator, transformer), **others}
            pipe = load_pipeline(args, folder, accelerator, **trained)
            with all_applied(averages):
                film = log_validation(args, accelerator, pipe, scheme, global_step, pair, followed)
            del pipe
            if pair and model_to_move:
                for other in others.values():
                    other.to("cpu")
            for offload in pair.blocks if pair else []:
                offload.put_away()
            free_memory()
        for other in others.values():
            other.train()
        accelerator.wait_for_everyone()
        return film

    def turn_is_over() -> bool:
        is_last = global_step >= args.max_train_steps
        return pair is not None and not is_last and global_step % args.expert_switch_steps == 0

    def must_be_finite(what: str, *values: torch.Tensor) -> None:
        if not all_finite(values):
            raise FloatingPointError(
                f"Step {global_step + 1}: {what} is not finite any more. Training ends here, and no such LoRA is "
                f"saved; a lower `--learning_rate` may help. {checkpoints.newest()}"
            )

    transformer.train()
    validation, film_step = None, None
    validation_steps = args.validation_steps or (args.validation_epochs or 0) * steps_per_epoch
    seen = {"clean": [], "corrupted": []}
    while global_step < args.max_train_steps:
        epoch, done = divmod(global_step, steps_per_epoch)
        dataloader.set_epoch(epoch)
        batches = accelerator.skip_first_batches(dataloader, done * args.gradient_accumulation_steps)
        for batch in times.waiting(batches if done else dataloader):
            with accelerator.accumulate(transformer):
                losses, clean = training_step(batch)
                must_be_finite("the loss", losses)
                with times.part("backward"):
                    accelerator.backward(losses.mean())
                norm = None
                with times.part("optimizer"):
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                        # In fp16 gradients may overflow: then the step is left out and their scale lowered.
                        if norm is not None and accelerator.mixed_precision != "fp16":
                            must_be_finite("the gradient", torch.as_tensor(norm))
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
            for loss, is_clean in zip(losses.tolist(), clean.tolist(), strict=True):
                seen["clean" if is_clean else "corrupted"].append(loss)
            if not accelerator.sync_gradients:
                continue

            must_be_finite("the LoRA", *parameters)
            if average:
                average.step()
            global_step += 1
            progress.update()
            all_losses = seen["clean"] + seen["corrupted"]
            logs = {"loss": sum(all_losses) / len(all_losses), "lr": lr_scheduler.get_last_lr()[0]}
            logs |= {f"loss/{kind}": sum(values) / len(values) for kind, values in seen.items() if values}
            logs |= {} if norm is None else {"grad_norm": float(norm)}
            logs["bank/errors"] = recycler.num_errors()
            logs |= times.step_done()
            progress.set_postfix(loss=f"{logs['loss']:.4f}", errors=logs["bank/errors"])
            if pair:
                # A turn is a part of one run, whose steps are those of both.
                pair.steps[args.expert] = global_step
                logs = {f"{args.expert}/{name}": value for name, value in logs.items()}
            accelerator.log(logs, step=sum(pair.steps.values()) if pair else global_step)
            seen = {"clean": [], "corrupted": []}
            if global_step == first_step + STEPS_TO_TELL or global_step % args.checkpointing_steps == 0:
                done, runs = (sum(pair.steps.values()), 2) if pair else (global_step, 1)
                logger.info(times.describe(runs * args.max_train_steps - done))
            checkpoints.poll()
            if global_step % args.checkpointing_steps == 0:
                checkpoints.save(global_step)
            if (
                args.validation_prompt
                and validation_steps
                and global_step % validation_steps == 0
                # Of a pair, the later one has a film made of both.
                and (pair is None or min(pair.steps.values()) == global_step)
            ):
                validation, film_step = validate(), global_step
                transformer.train()
            if global_step >= args.max_train_steps:
                break
            if turn_is_over():
                break
        # Here, so that no worker waits meanwhile with batches it has read.
        if turn_is_over():
            checkpoints.finish()
            bring_back = put_by(model_to_move, optimizer.optimizer, blocks)
            yield global_step
            bring_back()
    progress.close()
    checkpoints.finish()

    # Save, validate, push
    with all_applied(averages):
        state_dict = trained_state_dict(transformer, args.export_rank)
    if args.export_rank:
        config = replace(config, r=args.export_rank, lora_alpha=args.export_rank)
    state_dict = {name: value.to(getattr(torch, args.export_dtype)) for name, value in state_dict.items()}
    if accelerator.is_main_process:
        file = output_dir / weight_name(args.expert)
        write_lora(file, state_dict)
        if args.export_format == "original":
            write_lora(file.with_stem(f"{file.stem}_original"), state_dict, "original")
        write_run(arguments_file, run)
        logger.info(f"Saved {file}.")
    if pair:
        pair.finished.add(args.expert)
        if len(pair.finished) < len(pair.args):
            put_by(model_to_move, optimizer.optimizer, blocks)
            return
    if args.validation_prompt and film_step != global_step:
        validation = validate()
    if accelerator.is_main_process:
        for told in pair.args.values() if pair else [args]:
            save_model_card(told, scheme, repo_id, validation)
        if args.push_to_hub:
            try:
                push(output_dir, repo_id, args.expert, args.hub_token)
            except PushError as error:
                accelerator.end_training()
                raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(parse_args())
