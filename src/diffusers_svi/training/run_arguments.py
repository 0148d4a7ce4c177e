"""What a run may change when it goes on from a checkpoint: every argument of the training script is of one class.

What the LoRA becomes must not depend on where a run was stopped, and its file must not name a scheme that it was not
trained for. Of models and data the content is compared, not the name: folders move.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..files import written_whole
from .cache import fingerprint
from .samples import Samples


# They say what the LoRA is, or are part of the optimizer's state or the bank: another value is refused.
FIXED = (
    *("preset", "conditioning", "padding", "num_motion_frames", "num_motion_latents", "p_motion", "p_text_start"),
    *("reference", "first_frame_augmentation", "ref_pad_num", "repeat_first_frame", "mask_frames", "clip_resize"),
    *("expert", "quantize_base", "rank", "lora_alpha", "lora_layers", "lora_dropout"),
    *("init_lora", "init_lora_weight_name"),
    *("condition", "condition_modules", "module_sizes", "train_condition_modules", "p_no_condition", "p_no_image"),
    *("height", "width", "num_frames", "buckets", "fps", "center_crop", "random_flip", "samples_per_video"),
    *("enable_tiling", "variant"),
    *("proportion_empty_prompts", "max_sequence_length", "seed"),
    *("objective", "errors", "p_vid", "vid_sigmas", "p_img", "p_noi", "p_clean"),
    *("n_img", "img_slots", "img_sigmas", "img_scale", "error_modulate_factor"),
    *("num_grids", "bank_capacity", "bank_max_gb", "bank_dtype", "bank_mode", "bank_replacement", "bank_metric"),
    *("clean_buffer_update_prob", "buffer_warmup_iter", "flow_shift"),
    *("weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
    *("train_batch_size", "gradient_accumulation_steps", "mixed_precision"),
    # Of `accelerate launch`: checkpoints of DeepSpeed have a form of their own.
    "zero_stage",
    *("optimizer", "use_8bit_adam", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
    *("use_ema", "ema_decay"),
)
# The learning rate and its schedule: the new values hold from the next step on, which is told.
APPLIED = (
    *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    *("max_train_steps", "num_train_epochs"),
)
# They matter a bit, and are told.
TOLD = ("max_grad_norm", "gradient_checkpointing", "compile", "allow_tf32", "max_skipped_share")
# They name models and data, which are compared by `compare_content`.
COMPARED = (
    *("pretrained_model_name_or_path", "revision"),
    *("train_data_dir", "dataset_name", "dataset_config_name", "video_column", "caption_column"),
    *("condition_column", "audio_encoder"),
)
# What is trained does not depend on them.
FREE = (
    *("output_dir", "cache_dir", "latent_cache_dir", "dataloader_num_workers", "offload", "group_offload"),
    "bank_path",
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
    *("report_to", "tracker_name", "logging_dir"),
    *("validation_prompt", "validation_image", "num_validation_clips", "validation_steps", "validation_epochs"),
    *("validation_inference_steps", "validation_guidance_scale", "validation_condition"),
    # Experts learn the same whoever takes turns with them.
    "expert_switch_steps",
    *("export_format", "export_dtype", "export_rank", "push_to_hub", "hub_model_id", "hub_token"),
)
SECRET = ("hub_token",)


def describe_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the script by name, as JSON gives them back; secrets are left out."""
    return json.loads(json.dumps({name: value for name, value in arguments.items() if name not in SECRET}))


def describe_content(
    folder: str | os.PathLike, subfolder: str, samples: Samples, conditions: list[str] | None = None
) -> dict[str, Any]:
    """Fingerprints of the transformer in `subfolder` of a local model folder, and of what is trained on.

    `conditions` are the keys of what samples follow beside text, if they follow anything.
    """
    keys: list[list[str]] = [[samples.key(index), samples.caption(index)] for index in range(len(samples))]
    if conditions is not None:
        keys = [[*key, condition] for key, condition in zip(keys, conditions, strict=True)]
    return {
        "model": fingerprint_model(folder, subfolder),
        "samples": fingerprint(keys),
        "num_samples": len(samples),
    }


def fingerprint_model(folder: str | os.PathLike, subfolder: str) -> str:
    """Of a transformer in a local model folder, 64 hexadecimal digits: its settings and the ends of its weights."""
    folder, digest = Path(folder) / subfolder, hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as stream:
            # As `fingerprint_encoders`, and the middle, for the ends may be norms that a fine-tuning leaves alone.
            for position in (0, file.stat().st_size // 2, max(0, file.stat().st_size - 2**20)):
                stream.seek(position)
                digest.update(stream.read(2**20))
    return digest.hexdigest()


def compare_arguments(then: dict[str, Any], now: dict[str, Any], where: str) -> list[str]:
    """Refuse to go on with a run whose LoRA would not be the same any more.

    Args:
        then (`dict[str, Any]`), now (`dict[str, Any]`): Two of `describe_arguments`.
        where (`str`): What `then` was found in, for the message.

    Returns:
        What is different and goes on, a text for each argument.

    Raises:
        ValueError: if anything fixed differs; it names every such argument, with both values.
    """
    differing = {
        name: f"`--{name}` was {then[name]!r}, now {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    }
    # An argument of no class is one of tomorrow's: it is on the safe side.
    fixed = [text for name, text in differing.items() if name not in (*APPLIED, *TOLD, *COMPARED, *FREE)]
    if fixed:
        _refuse(where, "; ".join(fixed))
    return [text for name, text in differing.items() if name in (*APPLIED, *TOLD)]


def compare_content(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raise a `ValueError` unless model and data, two of `describe_content`, are the same."""
    if then["model"] != now["model"]:
        _refuse(where, "`--pretrained_model_name_or_path` had other weights")
    if then["samples"] != now["samples"]:
        _refuse(where, f"the data were others ({then['num_samples']} samples, now {now['num_samples']})")


def _refuse(where: str, differences: str) -> None:
    raise ValueError(
        f"{where} is of a run with other settings: {differences}. Give what it was begun with, or another "
        "`--output_dir` for a new run; `--init_lora` begins with a LoRA that was trained."
    )


def check_steps(done: int, max_train_steps: int | None) -> None:
    """Raise a `ValueError` if more steps were done than are wanted."""
    if max_train_steps is not None and done > max_train_steps:
        raise ValueError(
            f"`--max_train_steps`={max_train_steps}, but the checkpoint is of step {done}: give more steps, or go "
            "back to an earlier checkpoint."
        )


def write_run(file: Path, run: dict[str, Any]) -> None:
    """Keep beside a finished LoRA what it was trained with."""
    with written_whole(file) as unfinished:
        unfinished.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def read_run(file: Path) -> dict[str, Any] | None:
    """What the LoRA that lies here was trained with, if one does. Raises a `ValueError` if it cannot be read."""
    if not file.is_file():
        return None
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
        return {"arguments": dict(run["arguments"]), "content": dict(run["content"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): take it away, or give another `--output_dir`.") from error
