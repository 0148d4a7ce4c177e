"""Options of other scripts: equivalents are names of ours, and for the rest it is said what replaces them."""

from pathlib import Path

import pytest

from conftest import load_script
from diffusers_svi.training.known_elsewhere import INSTEAD, explain


BASE = ["--pretrained_model_name_or_path=x", "--report_to=none"]
# source: scripts/train/svi_shot.sh of the authors
SHOT = [
    *("--learning_rate", "1e-4", "--lora_rank", "128", "--lora_alpha", "128", "--dataset_path", "data", "--dit_path"),
    *("a.safetensors", "--vae_path", "b.pth", "--text_encoder_path", "c.pth", "--image_encoder_path", "d.pth"),
    *("--max_epochs", "10", "--train_architecture", "lora", "--use_gradient_checkpointing"),
    *("--use_gradient_checkpointing_offload", "--training_strategy", "deepspeed_stage_2", "--output_path", "out"),
    *("--use_error_recycling", "--error_buffer_k", "500", "--y_error_num", "3", "--num_motion_frames", "1"),
    *("--buffer_warmup_iter", "50", "--buffer_replacement_strategy", "l2_batch", "--y_error_sample_from_all_grids"),
    *("--num_grids", "50", "--noise_prob", "0.01", "--y_prob", "0.9", "--latent_prob", "0.9", "--clean_prob", "0.2"),
    *("--clean_buffer_update_prob", "0.1", "--exp_prefix", "train-svi-shot"),
]


@pytest.fixture(scope="module")
def parse_args():
    return load_script(Path(__file__).parents[1] / "examples" / "train_erft.py").parse_args


def test_the_authors_command_is_told_all_at_once_what_to_change(parse_args, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_args(SHOT)
    told = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and "options that are not known here" in told[0]
    assert [line.split(":")[0].strip("`") for line in told[1:]] == [
        *("--dit_path", "--vae_path", "--text_encoder_path", "--image_encoder_path", "--train_architecture"),
        *("--use_gradient_checkpointing_offload", "--training_strategy", "--use_error_recycling"),
        *("--y_error_sample_from_all_grids", "--exp_prefix"),
    ]
    assert "give `--pretrained_model_name_or_path`, a model in diffusers' layout" in told[1]


def test_the_rest_of_the_authors_command_is_understood(parse_args):
    """Of the flags that are known elsewhere, neither they nor their values are left."""
    rest, skip = [], False
    for item, value in zip(SHOT, [*SHOT[1:], "--"], strict=True):
        if item in INSTEAD:
            skip = not value.startswith("--")
        elif skip:
            skip = False
        else:
            rest.append(item)
    args = parse_args([*BASE, *rest])
    assert (args.train_data_dir, args.output_dir, args.num_train_epochs) == ("data", "out", 10)
    assert (args.rank, args.lora_alpha, args.learning_rate, args.gradient_checkpointing) == (128, 128, 1e-4, True)
    assert (args.bank_capacity, args.n_img, args.num_motion_frames, args.bank_replacement) == (500, 3, 1, "l2")
    assert (args.p_noi, args.p_img, args.p_vid, args.p_clean, args.buffer_warmup_iter) == (0.01, 0.9, 0.9, 0.2, 50)


def test_names_of_the_authors_are_names_of_ours(parse_args):
    given = ["--dataset_path=z", "--output_path=y", "--accumulate_grad_batches=3", "--gradient_clip_val=0.5"]
    given += ["--lora_target_modules=q,ffn.0", "--pretrained_lora_path=l", "--use_first_aug", "--tiled"]
    args = parse_args([*BASE, *given])
    assert (args.gradient_accumulation_steps, args.max_grad_norm, args.lora_layers) == (3, 0.5, "q,ffn.0")
    assert (args.init_lora, args.first_frame_augmentation, args.enable_tiling) == ("l", True, True)


def test_none_of_them_is_an_option_here(parse_args, capsys):
    """Or else it could never be given."""
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    ours = capsys.readouterr().out.replace(",", " ").replace("[", " ").split()
    assert "--output_path" in ours and not set(ours) & set(INSTEAD)


def test_an_option_with_its_value_is_found_once():
    assert explain(["--use_dora", "--dit_path=a", "--dit_path", "b", "dit_path", "--ditpath"]) == [
        "`--use_dora`: leave it out: what DoRA makes could not be loaded, for SVIPipeline takes plain LoRAs alone",
        "`--dit_path`: give `--pretrained_model_name_or_path`, a model in diffusers' layout, which holds all of them",
    ]
