"""Options of the authors' scripts and of diffusers' that the training script lacks, and what to do instead.

Options with an equivalent are names of it in the script itself; here are the others.
"""

from collections.abc import Sequence


_MODEL = "give `--pretrained_model_name_or_path`, a model in diffusers' layout, which holds all of them"
_TILES = "`--enable_tiling` takes the VAE's own tiles"
_ACCELERATE = "give it to `accelerate launch`; examples/accelerate_configs has configurations"
_PRODIGY = "leave it out: `--optimizer prodigy` has the settings of diffusers' scripts"
_NOTHING = "leave it out: it does nothing in the authors' code either"
_LAYOUT = "give `--train_data_dir`, a folder of videos with a CSV or JSONL file of captions"

INSTEAD = {
    # the authors' train_svi.py, train_svi_talk.py and train_svi_dance.py
    "--dit_path": _MODEL,
    "--vae_path": _MODEL,
    "--text_encoder_path": _MODEL,
    "--image_encoder_path": _MODEL,
    "--train_architecture": "leave it out: only LoRAs are trained",
    "--init_lora_weights": "leave it out: LoRAs begin as with `kaiming`",
    "--use_gradient_checkpointing_offload": "give `--gradient_checkpointing`; DeepSpeed can offload more",
    "--training_strategy": _ACCELERATE,
    "--num_nodes": _ACCELERATE,
    "--steps_per_epoch": "leave it out: an epoch is all samples; `--samples_per_video` makes more of them",
    "--use_error_recycling": "leave it out: every `--preset` but none recycles errors",
    "--y_error_sample_from_all_grids": "leave it out: it is always so; `--img_sigmas` takes a range of noise levels",
    "--y_error_sample_range": "give `--img_sigmas LOW HIGH`, noise levels between 0 and 1",
    "--use_last_y_error": "leave it out: errors of conditions are a run of latent frames from anywhere, as published",
    "--timestep_grid_size": "give `--num_grids`, their number",
    "--error_setting": _NOTHING,
    "--use_real_latent": "leave it out: errors are of one-step integration, as published for Shot and Film",
    "--exp_prefix": "give `--output_dir`, and `--tracker_name` for the logs",
    "--use_swanlab": "give `--report_to swanlab`",
    "--swanlab_mode": "give `--report_to swanlab`, and its mode as SWANLAB_MODE in the environment",
    "--tile_size_height": _TILES,
    "--tile_size_width": _TILES,
    "--tile_stride_height": _TILES,
    "--tile_stride_width": _TILES,
    # public re-implementations
    "--svi_spatial_pool": "give `--bank_max_gb` or `--bank_dtype int8`: errors are kept whole",
    "--svi_loss_mask_cond_frames": "leave it out: held latents never count in the loss",
    # diffusers' scripts
    "--use_dora": "leave it out: what DoRA makes could not be loaded, for SVIPipeline takes plain LoRAs alone",
    "--prodigy_beta3": _PRODIGY,
    "--prodigy_decouple": _PRODIGY,
    "--prodigy_use_bias_correction": _PRODIGY,
    "--prodigy_safeguard_warmup": _PRODIGY,
    "--enable_slicing": "leave it out: the encoders take one sample at a time",
    "--cache_latents": "leave it out: latents and embeddings are always kept; `--latent_cache_dir` says where",
    "--instance_data_dir": _LAYOUT,
    "--instance_data_root": _LAYOUT,
    "--instance_prompt": "give every video its caption; `--proportion_empty_prompts` trains without",
    "--max_num_frames": "give `--num_frames`",
    "--resolution": "give `--height` and `--width`",
    "--aspect_ratio_buckets": "give `--buckets`, each as width x height: 832x480 480x832",
    "--video_resolution_buckets": "give `--buckets`, each as width x height x frames: 832x480x81",
    "--bnb_quantization_config_path": "give `--quantize_base` and one of its forms",
    "--guidance_scale": "give `--validation_guidance_scale`",
    "--num_validation_videos": "give `--num_validation_clips`: one film is made",
    "--validation_images": "give `--validation_image`, one",
    "--noised_image_dropout": "leave it out: `--p_img` and `--p_clean` say how often conditions are corrupted",
    "--upcast_before_saving": "give `--export_dtype`, which is float32 by default",
}


def explain(arguments: Sequence[str]) -> list[str]:
    """What to do in place of each of `arguments` that is an option known elsewhere only, a text each."""
    names = dict.fromkeys(argument.split("=", 1)[0] for argument in arguments)
    return [f"`{name}`: {INSTEAD[name]}" for name in names if name in INSTEAD]
