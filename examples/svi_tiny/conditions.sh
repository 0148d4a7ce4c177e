#!/usr/bin/env bash
# LoRAs by which svi-tiny follows voices or poses, with the modules for that, by error recycling and without.
#
#     examples/svi_tiny/conditions.sh audio
#     examples/svi_tiny/conditions.sh pose
#
# First, on clean conditions, from a LoRA that knows the scheme and fresh modules; from there, on the same clips, plainly
# and with recycled errors. Both are trained, LoRA and modules; the base is frozen. The same call again goes on from the
# last checkpoint.
#
# Settings, from the environment: OUT, STEPS (of the first part), MORE (of each of the others), BATCH, PYTHON.
set -euo pipefail
OUT=${OUT:-outputs/conditions} STEPS=${STEPS:-200} MORE=${MORE:-150} BATCH=${BATCH:-4} PYTHON=${PYTHON:-python}
if [[ $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=examples${PYTHONPATH:+:$PYTHONPATH} ACCELERATE_USE_CPU=true

case ${1:-} in
audio)
    preset=talk sizes=(audio_hidden_dim=64 audio_tokens=4 audio_token_dim=64) errors=3 samples=2
    options=(--audio_encoder "$OUT/audio/ear")
    ;;
pose)
    preset=dance sizes=(pose_dim=8) errors=1 samples=1
    options=()
    ;;
*)
    echo "Say audio or pose, got '${1:-}'." >&2
    exit 1
    ;;
esac
films=$OUT/$1
if [[ ! -e $films/metadata.csv ]]; then
    "$PYTHON" -m svi_tiny.voices --follows "$1" --output_dir "$films" --num_videos 192
fi

# From the name of a folder, steps and options to a LoRA with its modules in that folder.
train() {
    local folder=$OUT/$1 steps=$2
    if [[ -e $folder/pytorch_lora_weights.safetensors ]]; then return; fi
    "$PYTHON" examples/train_erft.py --condition "${films##*/}" "${options[@]}" --train_condition_modules \
        --pretrained_model_name_or_path examples/svi_tiny/model --train_data_dir "$films" \
        --samples_per_video "$samples" --center_crop --height 64 --width 64 --num_frames 17 --fps 8 --max_sequence_length 32 \
        --padding reference --rank 16 --train_batch_size "$BATCH" --lr_scheduler cosine --lr_warmup_steps 20 \
        --mixed_precision no --report_to none --checkpointing_steps 50 --checkpoints_total_limit 1 \
        --resume_from_checkpoint latest --latent_cache_dir "$OUT/cache" --output_dir "$folder" \
        --max_train_steps "$steps" "${@:3}"
}

train "$preset-first" "$STEPS" --preset none --learning_rate 1.5e-3 \
    --init_lora examples/svi_tiny/loras --init_lora_weight_name control.safetensors \
    --condition_modules init --module_sizes "${sizes[@]}"
more=(--learning_rate 1e-3 --init_lora "$OUT/$preset-first" --init_lora_weight_name pytorch_lora_weights.safetensors
    --export_dtype bfloat16 --export_rank 11) # of 16, so that a file is below 3 MB
train "$preset-control" "$MORE" "${more[@]}" --preset none
# The errors are those of svi-tiny's Shot LoRA.
train "$preset" "$MORE" "${more[@]}" --preset "$preset" --n_img "$errors" --bank_capacity 8 \
    --p_vid 0 --p_noi 0 --p_clean 0.3 --img_sigmas 0 0.7 --img_scale 0.5 2
