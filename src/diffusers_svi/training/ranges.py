"""What numbers the arguments of the training script may be, and which go together."""

import math
import os
from collections.abc import Mapping

from ..wan import MAX_TOKENS


COUNTS = (
    *("rank", "train_batch_size", "gradient_accumulation_steps", "samples_per_video", "checkpointing_steps"),
    *("checkpoints_total_limit", "max_train_steps", "num_train_epochs", "lr_num_cycles", "validation_steps"),
    *("validation_epochs", "num_validation_clips", "validation_inference_steps", "max_sequence_length"),
    *("num_grids", "bank_capacity", "expert_switch_steps"),
)
NOT_NEGATIVE = (
    *("lr_warmup_steps", "buffer_warmup_iter", "dataloader_num_workers", "adam_weight_decay"),
    *("validation_guidance_scale", "mode_scale"),
)
POSITIVE = ("lora_alpha", "flow_shift", "adam_epsilon", "max_grad_norm", "bank_max_gb", "lr_power", "logit_std")
SHARES = (
    *("p_motion", "p_text_start", "proportion_empty_prompts", "max_skipped_share", "clean_buffer_update_prob"),
    *("p_no_condition", "p_no_image"),
)
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout", "ema_decay")
# diffusers' own, where it is left alone.
EMA_DECAY = 0.9999
# What is for one choice of another option only, and its value where it is left alone.
OPTIONS_OF = {
    "expert_switch_steps": ("expert", "both", 100),
    "lr_num_cycles": ("lr_scheduler", "cosine_with_restarts", 1),
    "lr_power": ("lr_scheduler", "polynomial", 1.0),
    "logit_mean": ("weighting_scheme", "logit_normal", 0.0),
    "logit_std": ("weighting_scheme", "logit_normal", 1.0),
    "mode_scale": ("weighting_scheme", "mode", 1.29),
}


def check_ranges(values: Mapping[str, object]) -> None:
    """Raise a `ValueError`, which names argument, value and range, for a number that an argument must not be.

    Args:
        values (`Mapping[str, object]`): Arguments by name; what is no number, `None` say, is left alone.
    """
    for name, value in values.items():
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                wanted = _outside(name, number)
                if wanted is not None:
                    raise ValueError(f"`--{name}` {wanted}, got {number}.")


def _outside(name: str, value: float) -> str | None:
    """What `name` is to be, if `value` is not that."""
    if not math.isfinite(value):
        return "must be a finite number"
    if name in COUNTS and value < 1:
        return "must be at least 1"
    if name == "max_sequence_length" and value > MAX_TOKENS:
        return f"must be at most {MAX_TOKENS}"
    if name in NOT_NEGATIVE and value < 0:
        return "must not be negative"
    if name in POSITIVE and value <= 0:
        return "must be above 0"
    if name in SHARES and not 0 <= value <= 1:
        return "is a share in [0, 1]"
    if name in BELOW_ONE and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    if name == "learning_rate" and not 0 <= value <= 1:
        return "must be between 0 and 1"
    if name == "seed" and not 0 <= value < 2**32:
        return "must be a whole number from 0 to 4294967295"
    return None


def check_combinations(values: Mapping[str, object]) -> None:
    """Raise a `ValueError` for an argument that would do nothing beside the others.

    Args:
        values (`Mapping[str, object]`): All arguments by name.
    """
    for name, (option, choice, default) in OPTIONS_OF.items():
        if values[name] != default and values[option] != choice:
            raise ValueError(f"`--{name}`={values[name]} is for `--{option} {choice}`, got {values[option]}.")
    for name, usual in (("errors", "bank"), ("objective", "recycled")):
        if values[name] != usual and (values["p_vid"] == 0 or values["p_clean"] == 1):
            raise ValueError(
                f"`--{name} {values[name]}` is about errors on the latents, but none get any with "
                f"`--p_vid`={values['p_vid']} and `--p_clean`={values['p_clean']}: give `--p_vid` above 0 and "
                "`--p_clean` below 1."
            )
    if values["lr_warmup_steps"] and values["lr_scheduler"] == "constant":
        raise ValueError(
            f"`--lr_warmup_steps`={values['lr_warmup_steps']} needs another `--lr_scheduler` than constant, such as "
            "constant_with_warmup."
        )
    if values["init_lora_weight_name"] and not values["init_lora"]:
        raise ValueError(
            f"`--init_lora_weight_name`={values['init_lora_weight_name']} is a file of `--init_lora`: give that too."
        )
    if values["init_lora_weight_name"] and values["expert"] == "both":
        raise ValueError(
            f"`--init_lora_weight_name`={values['init_lora_weight_name']} is for one expert: for `--expert both` the "
            "files have the names that a run gives them."
        )
    if values["ema_decay"] != EMA_DECAY and not values["use_ema"]:
        raise ValueError(f"`--ema_decay`={values['ema_decay']} does nothing without `--use_ema`.")
    if values["validation_steps"] and values["validation_epochs"]:
        raise ValueError("Give one of `--validation_steps` and `--validation_epochs`, got both.")
    for name in ("validation_steps", "validation_epochs", "num_validation_clips"):
        if values[name] and not values["validation_prompt"]:
            raise ValueError(f"`--{name}`={values[name]} does nothing without `--validation_prompt`.")
    usual_slots: dict[str, object] = {"num_motion_latents": 1, "img_slots": "motion"}
    for name, value in usual_slots.items():
        if values[name] != value and values["conditioning"] == "pixel":
            raise ValueError(f"`--{name}`={values[name]} is for `--conditioning latent` or `held`, got pixel.")
    if values["group_offload"]:
        if not values["gradient_checkpointing"]:
            raise ValueError(
                "`--group_offload` needs `--gradient_checkpointing`: without it the backward pass would want all "
                "blocks on the device at once."
            )
        if values["quantize_base"]:
            raise ValueError(
                f"`--group_offload` moves plain weights, `--quantize_base {values['quantize_base']}` has others: give "
                "one of the two."
            )


# What is for films that follow audio or poses.
_OF_CONDITIONS = (
    *("condition_column", "audio_encoder", "condition_modules", "module_sizes", "train_condition_modules"),
    *("p_no_condition", "p_no_image", "validation_condition"),
)


def check_condition_options(values: Mapping[str, object]) -> None:
    """Raise a `ValueError` for what `--condition` cannot be used with, and for its options where there is none.

    Args:
        values (`Mapping[str, object]`): All arguments by name.
    """
    condition = values["condition"]
    if condition is None:
        for name in _OF_CONDITIONS:
            if values[name] not in (None, False):
                raise ValueError(f"`--{name}` is for `--condition audio` or `pose`, or `--preset talk` or `dance`.")
        return
    if values["expert"]:
        raise ValueError(
            f"`--condition {condition}` is for models with one transformer: there are no modules for the experts of "
            f"Wan 2.2 A14B. Leave out `--expert {values['expert']}`."
        )
    if values["conditioning"] == "held":
        raise ValueError(
            f"`--condition {condition}` is for image-to-video models that are given a condition beside the film: "
            "`--conditioning held`, for TI2V-5B, has none."
        )
    if condition == "audio" and values["fps"] == "none":
        raise ValueError(
            "`--condition audio` has a row a frame: give `--fps`, the rate of the clips, instead of none."
        )
    if condition == "pose" and values["audio_encoder"]:
        raise ValueError("`--audio_encoder` is for `--condition audio`, got pose.")
    if condition == "pose" and values["random_flip"]:
        raise ValueError(
            "`--random_flip`: in a mirrored skeleton the left limbs have the colours of the right ones. Leave it out "
            "with `--condition pose`."
        )
    if (values["validation_prompt"] is None) != (values["validation_condition"] is None):
        raise ValueError(
            f"A validation film with `--condition {condition}` needs `--validation_prompt`, `--validation_image` and "
            "`--validation_condition`."
        )
    path = values["validation_condition"]
    if path is not None and not os.path.exists(str(path)):
        raise ValueError(f"`--validation_condition`={path!r} is not there.")


def check_buckets(values: Mapping[str, object]) -> None:
    """Raise a `ValueError` for a size or length that buckets already have.

    Args:
        values (`Mapping[str, object]`): All arguments by name, those that were not given `None`.
    """
    buckets = values["buckets"]
    if not isinstance(buckets, list):
        return
    for name in ("height", "width"):
        if values[name] is not None:
            raise ValueError(f"`--{name}`={values[name]} is not for `--buckets`, which have sizes: leave it out.")
    if values["num_frames"] is not None and all(bucket.count("x") == 2 for bucket in buckets):
        raise ValueError(
            f"`--num_frames`={values['num_frames']} would do nothing: all of `--buckets` have frames, "
            f"{' '.join(buckets)}. Leave it out."
        )
