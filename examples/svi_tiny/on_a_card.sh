#!/usr/bin/env bash
# A larger svi-tiny, from nothing to figures, on one GPU and in parts.
#
#     examples/svi_tiny/on_a_card.sh [STAGE...]
#
# Stages: vae, transformer, loras, drift, correction; all, in this order, if none is given. A call works for at most
# MINUTES minutes and stops; the same call again goes on from there. Exit status: 0 if all is done, 75 if it is to be
# called again, anything else if something failed.
#
#     OUT/keep    what it goes on from, less than 60 MB in all, so that it can be copied from part to part
#     OUT/again   what can be made again: encoded clips, videos, checkpoints within a LoRA's training. Where it is still
#                 there it saves time, and a LoRA goes on where it was instead of from its beginning
#
# Settings, from the environment: OUT, MINUTES, SIZE (card; or tenth, ten steps of everything on a CPU, to see that it
# runs), SHARE (of the card's steps, clips, chains and images, 1 for all; less is a try, in an OUT of its own), PYTHON.
set -euo pipefail
OUT=${OUT:-outputs/card} MINUTES=${MINUTES:-9} SIZE=${SIZE:-card} SHARE=${SHARE:-1} PYTHON=${PYTHON:-python}

if [[ ! $MINUTES =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    echo "MINUTES is a number, got $MINUTES." >&2
    exit 1
fi
if [[ ! $SHARE =~ ^(1(\.0*)?|0?\.[0-9]*[1-9][0-9]*)$ ]]; then
    echo "SHARE is above 0 and at most 1, got $SHARE." >&2
    exit 1
fi
if [[ $SIZE != card && $SHARE != 1 ]]; then
    echo "SHARE is for SIZE=card, got SIZE=$SIZE." >&2
    exit 1
fi
if (($# == 0)); then set -- vae transformer loras drift correction; fi
for stage in "$@"; do
    if [[ ! $stage =~ ^(vae|transformer|loras|drift|correction)$ ]]; then
        echo "Stages are vae, transformer, loras, drift and correction, got $stage." >&2
        exit 1
    fi
done
if [[ $OUT != /* ]]; then OUT=$PWD/$OUT; fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT#"$PWD/"}  # as short as it can be: it stands in the records
export PYTHONPATH=examples${PYTHONPATH:+:$PYTHONPATH}
keep=$OUT/keep again=$OUT/again model=$OUT/keep/model results=$OUT/keep/results
limit=$(awk -v minutes="$MINUTES" 'BEGIN { print int(60 * minutes) }')

share_of() { # COUNT LEAST
    awk -v count="$1" -v least="$2" -v share="$SHARE" 'BEGIN { n = int(share * count + 0.5); print (n < least ? least : n) }'
}

case $SIZE in
card)
    precision=bf16 device=cuda workers=$(nproc) optimizer=muon
    vae=(--max_train_steps "$(share_of 5000 1)" --train_batch_size 32 --checkpointing_steps 500)
    transformer=(--max_train_steps "$(share_of 20000 1)" --train_batch_size 64 --checkpointing_steps 1000
        --validation_steps 2000 --num_clips "$(share_of 32768 64)")
    video_folders=8 videos_a_folder=$(share_of 64 2)
    plain_steps=$(share_of 3000 1) rounds=$(share_of 4 1)
    round_steps=$(($(share_of 10000 1) / rounds)) lora=(--train_batch_size 16 --checkpointing_steps 250)
    drift=(--num_chains "$(share_of 16 2)" --num_clips 50)
    images=$(share_of 16 2) correction=()
    ;;
tenth)
    precision=no device=cpu workers=0 optimizer=adamw # Muon is in bfloat16, which few CPUs are quick at
    vae=(--max_train_steps 10 --train_batch_size 1 --validation_steps 1 --num_validation_clips 1
        --num_statistics_clips 2)
    transformer=(--max_train_steps 10 --train_batch_size 2 --num_validation_clips 1 --num_clips 8)
    video_folders=1 videos_a_folder=4
    plain_steps=10 rounds=1 round_steps=10 lora=(--train_batch_size 2 --dataloader_num_workers 0)
    drift=(--num_chains 1 --num_clips 2 --num_inference_steps 2)
    images=2 correction=(--kind exposure --size medium --num_inference_steps 2)
    ;;
*)
    echo "SIZE is card or tenth, got $SIZE." >&2
    exit 1
    ;;
esac

if [[ $device == cuda ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "SIZE=$SIZE needs a GPU, and PyTorch sees none." >&2
    exit 1
fi

left() { # Seconds.
    echo $((limit > SECONDS ? limit - SECONDS : 0))
}

minutes_to_train() { # What is left, less what it takes to start and to save.
    awk -v seconds="$(left)" 'BEGIN { print (seconds > 30 ? (seconds - 30) / 60 : 0) }'
}

within_time() { # COMMAND...: stopped when the time is over. All that is called so leaves what it has finished in files.
    local seconds
    seconds=$(left)
    timeout --foreground $((seconds > 0 ? seconds : 1)) "$@" # 0 would be for ever
}

tell_size() {
    local bytes
    bytes=$(find "$keep" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
    echo "$bytes bytes are in $keep."
    if ((bytes > 60000000)); then echo "WARNING: that is more than 60 MB." >&2; fi
}

at_once() { # COMMAND ARGUMENT...: with each argument, all at the same time. What failed is told before what is not done.
    local command=$1 argument pid one running=() status=0
    shift
    for argument in "$@"; do
        "$command" "$argument" &
        running+=($!)
    done
    for pid in "${running[@]}"; do
        one=0
        wait "$pid" || one=$?
        if ((one && (status == 0 || status == 75 || status == 124))); then status=$one; fi
    done
    return "$status"
}

pause() { # WHERE: the end of a part.
    echo "Stopped after $((SECONDS / 60)) min $((SECONDS % 60)) s: $1. The same command goes on from there."
    tell_size
    exit 75
}

step() { # NAME RESULT COMMAND...: unless its result is there. Where the time is over, the part ends.
    local name=$1 result=$2 status=0
    shift 2
    if [[ -e $result ]]; then return; fi
    local begun=$SECONDS
    if ((started && $(left) == 0)); then pause "next is $name"; fi
    started=1
    echo "== $name"
    # Not `"$@" || status=$?`: there `set -e` would not hold, and what comes after a failure would be done.
    set +e
    (
        set -e
        "$@"
    )
    status=$?
    set -e
    case $status in
    0) echo "$name: $((SECONDS - begun)) s" ;;
    75 | 124) pause "within $name" ;; # by itself; by `timeout`
    *)
        echo "$name failed, with status $status." >&2
        exit "$status"
        ;;
    esac
}

# 1. A VAE and a transformer, from scratch

train() { # vae|transformer OPTION...: checkpoints are of weights alone, 16 bits each.
    local part=$1
    shift
    "$PYTHON" -m "svi_tiny.train_$part" --size "$SIZE" --output_dir "$model" --checkpoint_dir "$keep/checkpoint/$part" \
        --weights_only --mixed_precision "$precision" --dataloader_num_workers "$workers" \
        --optimizer "$optimizer" --max_minutes "$(minutes_to_train)" "$@"
    rm -rf "$keep/checkpoint/$part"
}

# 2. LoRAs: a plain one learns the scheme; from it the control goes on plainly, and the other with recycled errors

make_folder() { # SEED: 0 trained svi-tiny, 1 measures it.
    within_time "$PYTHON" -m svi_tiny.videos --output_dir "$again/making/$1" --seed "$1" \
        --num_videos "$videos_a_folder" --setting consistent
}

make_videos() {
    local seeds
    mapfile -t seeds < <(seq 10 $((9 + video_folders)))
    at_once make_folder "${seeds[@]}"
    mv "$again/making" "$again/world"
}

train_lora() { # NAME STEPS OPTION...
    local name=$1 steps=$2
    shift 2
    within_time "$PYTHON" examples/train_erft.py --pretrained_model_name_or_path "$model" \
        --train_data_dir "$again/world" --center_crop --height 64 --width 64 --num_frames 17 --fps 8 \
        --max_sequence_length 32 --latent_cache_dir "$again/samples" --mixed_precision "$precision" --report_to none \
        --padding reference --reference before --p_motion 0.85 --rank 16 --max_train_steps "$steps" "${lora[@]}" \
        --lr_warmup_steps 20 --checkpoints_total_limit 1 --resume_from_checkpoint latest \
        --export_dtype bfloat16 --output_dir "$again/$name" "$@"
    mkdir -p "$keep/loras"
    cp "$again/$name/pytorch_lora_weights.safetensors" "$keep/loras/$name.part"
    mv "$keep/loras/$name.part" "$keep/loras/$name.safetensors"
    rm -r "${again:?}/$name"
}

# Error recycling as published, but with one latent frame of errors, since a clip has five, and a small bank, which does
# as well. Each round is short enough for one part and begins with an empty bank and optimizer.
train_next() { # control|erft: `round`, unless it is done.
    local kind=$1 from=plain options=(--preset none)
    if [[ -e $keep/loras/$kind-$round.safetensors ]]; then return; fi
    if [[ $kind == erft ]]; then options=(--preset shot --n_img 1 --bank_capacity 8); fi
    if ((round > 1)); then from=$kind-$((round - 1)); fi
    if ((round == rounds)); then options+=(--lr_scheduler cosine); else options+=(--lr_scheduler constant_with_warmup); fi
    train_lora "$kind-$round" "$round_steps" --init_lora "$keep/loras/$from.safetensors" --learning_rate 6e-4 \
        "${options[@]}"
}

train_round() {
    at_once train_next control erft
    rm -f "$keep/loras/"*-$((round - 1)).safetensors
    touch "$keep/round-$round"
}

make_loras() {
    local round
    if [[ -e $keep/round-$rounds ]]; then
        rm -f "$keep/loras/plain.safetensors"
        return
    fi
    step "videos for the LoRAs" "$again/world" make_videos
    step "plain LoRA" "$keep/loras/plain.safetensors" \
        train_lora plain "$plain_steps" --preset none --learning_rate 1e-3 --lr_scheduler cosine
    for ((round = 1; round <= rounds; round++)); do
        step "control and ERFT LoRA, round $round of $rounds" "$keep/round-$round" train_round
    done
    rm -f "$keep/loras/plain.safetensors"
}

# 3. Figures

finished() { # control|erft: its LoRA, as `drift.py` takes it.
    echo "$1=$keep/loras/$1-$rounds.safetensors"
}

drift_of() { # OPTION...: chains that are done stay in its folder.
    within_time "$PYTHON" benchmarks/drift.py --model_dir "$model" --device "$device" --settings consistent \
        "${drift[@]}" --output_dir "$keep/drift" "$@"
}

drift_alone() { # base|control|erft: its chains are there when all are compared.
    local who=(--contestants)
    if [[ $1 == base ]]; then who+=(base); else who+=(--lora "$(finished "$1")"); fi
    drift_of "${who[@]}"
}

measure_drift() {
    if [[ $device == cuda ]]; then at_once drift_alone base control erft; fi # one process leaves most of it idle
    drift_of --contestants base --lora "$(finished control)" "$(finished erft)"
    mkdir -p "$results/drift"
    mv "$keep/drift/"*.png "$results/drift"
    mv "$keep/drift/drift.json" "$results/drift"
}

correction_of() { # control|erft: of one LoRA beside the base.
    local prompts prompt image given=()
    mapfile -t prompts <"$again/stills/prompts.txt"
    for image in "$again/stills/"*.png; do given+=(--image "$image"); done
    for prompt in "${prompts[@]}"; do given+=(--prompt "$prompt"); done
    within_time "$PYTHON" -m diffusers_svi correct --model "$model" --lora "$keep/loras/$1-$rounds.safetensors" \
        --preset shot --height 64 --width 64 --num_frames 17 --num_inference_steps 10 --guidance_scale 1 \
        --max_sequence_length 32 --device "$device" --dtype float32 "${given[@]}" "${correction[@]}" \
        --out_dir "$keep/correction/$1"
}

measure_correction() {
    "$PYTHON" -m svi_tiny.stills --output_dir "$again/stills" --num_images "$images"
    at_once correction_of control erft
    mkdir -p "$results"
    mv "$keep/correction" "$results"
}

started=0
mkdir -p "$keep" "$again"
if [[ -e $keep/settings && $(<"$keep/settings") != "SIZE=$SIZE SHARE=$SHARE" ]]; then
    echo "$OUT was begun with $(<"$keep/settings"), not SIZE=$SIZE SHARE=$SHARE: give another OUT." >&2
    exit 1
fi
echo "SIZE=$SIZE SHARE=$SHARE" >"$keep/settings"
for stage in "$@"; do
    case $stage in
    vae) step "VAE" "$model/vae/diffusion_pytorch_model.safetensors" train vae "${vae[@]}" ;;
    transformer)
        step "transformer" "$model/model_index.json" \
            train transformer --cache_dir "$again/latents" "${transformer[@]}"
        ;;
    loras) make_loras ;;
    drift) step "drift" "$results/drift/drift.json" measure_drift ;;
    correction) step "correction" "$results/correction" measure_correction ;;
    esac
done
mkdir -p "$results/training"
cp "$model/training/"*.json "$results/training"
echo "Done: $*. Results are in $results."
tell_size
