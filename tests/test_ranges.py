"""Numbers that an argument must not be are refused by name, value and range."""

import re
from pathlib import Path

import pytest
import torch

from conftest import load_script
from diffusers_svi.training import ranges
from diffusers_svi.training.finite import all_finite
from diffusers_svi.training.ranges import check_combinations, check_ranges


BASE = ["--pretrained_model_name_or_path=x", "--output_dir=y", "--train_data_dir=z", "--report_to=none"]


@pytest.fixture(scope="module")
def parse_args():
    return load_script(Path(__file__).parents[1] / "examples" / "train_erft.py").parse_args


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
def test_every_number_must_be_finite(parse_args, capsys, value):
    """All options of the parser that take a float are tried, those of two numbers at both."""
    floats = [name for name, default in vars(parse_args(BASE)).items() if isinstance(default, float)]
    assert len(floats) > 15
    options = [[f"--{name}={value}"] for name in (*floats, "lora_alpha", "bank_max_gb")]
    options += [
        [f"--{name}", *pair]
        for name in ("vid_sigmas", "img_sigmas", "img_scale")
        for pair in ((value, "1"), ("0", value))
    ]
    for option in options:
        with pytest.raises(SystemExit) as exit:
            parse_args([*BASE, *option])
        told = capsys.readouterr().err
        name = option[0].split("=")[0]
        assert exit.value.code == 1
        assert f"`{name}` must be a finite number, got {float(value)}." in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        *((name, 0, "must be at least 1") for name in ranges.COUNTS),
        *((name, -1, "must not be negative") for name in ranges.NOT_NEGATIVE),
        *((name, 0.0, "must be above 0") for name in ranges.POSITIVE),
        *((name, 1.01, "is a share in [0, 1]") for name in ranges.SHARES),
        *((name, -0.01, "is a share in [0, 1]") for name in ranges.SHARES),
        *((name, 1.0, "must be at least 0 and below 1") for name in ranges.BELOW_ONE),
        ("learning_rate", 1e30, "must be between 0 and 1"),
        ("learning_rate", -1e-5, "must be between 0 and 1"),
        ("max_sequence_length", 513, "must be at most 512"),
        ("seed", -1, "must be a whole number from 0 to 4294967295"),
        ("seed", 2**32, "must be a whole number from 0 to 4294967295"),
    ],
)
def test_a_number_out_of_its_range_is_refused(name, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"`--{name}` {wanted}, got {value}.")):
        check_ranges({"other": None, name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr_num_cycles=2"], "`--lr_num_cycles`=2 is for `--lr_scheduler cosine_with_restarts`, got constant."),
        (
            ["--lr_power=2", "--lr_scheduler=linear"],
            "`--lr_power`=2.0 is for `--lr_scheduler polynomial`, got linear.",
        ),
        (["--logit_mean=1"], "`--logit_mean`=1.0 is for `--weighting_scheme logit_normal`, got svi."),
        (["--logit_std=2", "--weighting_scheme=mode"], "`--logit_std`=2.0 is for `--weighting_scheme logit_normal`"),
        (["--mode_scale=1"], "`--mode_scale`=1.0 is for `--weighting_scheme mode`, got svi."),
        (["--errors=self", "--p_vid=0"], "`--errors self` is about errors on the latents, but none get any"),
        (["--objective=restorative", "--preset=none"], "`--objective restorative` is about errors on the latents"),
        (["--lr_warmup_steps=5"], "`--lr_warmup_steps`=5 needs another `--lr_scheduler` than constant"),
        (
            ["--validation_steps=1", "--validation_epochs=1"],
            "Give one of `--validation_steps` and `--validation_epochs`",
        ),
        (["--validation_steps=2"], "`--validation_steps`=2 does nothing without `--validation_prompt`."),
        (["--validation_epochs=2"], "`--validation_epochs`=2 does nothing without `--validation_prompt`."),
        (["--num_validation_clips=2"], "`--num_validation_clips`=2 does nothing without `--validation_prompt`."),
        (["--init_lora_weight_name=a"], "`--init_lora_weight_name`=a is a file of `--init_lora`: give that too."),
        (["--dataset_config_name=a"], "`--dataset_config_name`=a is for `--dataset_name`: leave it out."),
        (["--pretrained_model_name_or_path=.", "--revision=a"], "`--revision`=a is of a repository, but"),
        (["--num_motion_latents=2"], "`--num_motion_latents`=2 is for `--conditioning latent` or `held`, got pixel."),
        (["--img_slots=all"], "`--img_slots`=all is for `--conditioning latent` or `held`, got pixel."),
        (["--preset=pro", "--num_motion_frames=5"], "`--num_motion_frames`=5 is for `--conditioning pixel`, got lat"),
        (["--preset=pro", "--padding=zeros"], "`--padding`=zeros is for `--conditioning pixel`, got latent."),
        (["--optimizer=prodigy", "--use_8bit_adam"], "`--use_8bit_adam` is for `--optimizer adamw`, got prodigy."),
        (["--group_offload"], "`--group_offload` needs `--gradient_checkpointing`: without it the backward pass"),
        (["--ema_decay=0.9"], "`--ema_decay`=0.9 does nothing without `--use_ema`."),
        (["--lora_layers=to_z"], "`--lora_layers`: 'to_z' is none of"),
        (
            ["--buckets", "64x32", "--height=32"],
            "`--height`=32 is not for `--buckets`, which have sizes: leave it out.",
        ),
        (["--buckets", "64x32", "--width=64"], "`--width`=64 is not for `--buckets`"),
        (
            ["--buckets", "64x32x9", "32x64x5", "--num_frames=9"],
            "`--num_frames`=9 would do nothing: all of `--buckets` have frames, 64x32x9 32x64x5. Leave it out.",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(parse_args, capsys, options, message):
    with pytest.raises(SystemExit) as exit:
        parse_args([*BASE, *options])
    assert exit.value.code == 1 and message in capsys.readouterr().err


def test_blocks_are_moved_by_one_only(parse_args):
    values = vars(parse_args([*BASE, "--group_offload", "--gradient_checkpointing"])) | {"quantize_base": "4bit"}
    with pytest.raises(ValueError, match="moves plain weights, `--quantize_base 4bit` has others: give one"):
        check_combinations(values)
    check_combinations({**values, "quantize_base": None})


def test_what_goes_together_is_taken(parse_args):
    parse_args([*BASE, "--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2", "--lr_warmup_steps=5"])
    parse_args([*BASE, "--lr_scheduler=polynomial", "--lr_power=2", "--weighting_scheme=mode", "--mode_scale=1"])
    args = parse_args([*BASE, "--weighting_scheme=logit_normal", "--logit_mean=1", "--optimizer=AdamW"])
    assert (args.optimizer, args.learning_rate) == ("adamw", 1e-4)
    args = parse_args([*BASE, "--buckets", "64x32", "32x64x5", "--num_frames=9"])
    assert (args.buckets, args.width, args.height, args.num_frames) == (["64x32x9", "32x64x5"], 64, 32, 9)
    args = parse_args(BASE)
    assert (args.buckets, args.width, args.height, args.num_frames) == (None, 832, 480, 81)


def test_the_ends_of_ranges_and_what_is_no_number_are_taken():
    check_ranges(dict.fromkeys(ranges.COUNTS, 1) | dict.fromkeys(ranges.NOT_NEGATIVE, 0))
    check_ranges(dict.fromkeys(ranges.BELOW_ONE, 0.0) | {"learning_rate": 0.0, "seed": 0})
    check_ranges(dict.fromkeys(ranges.SHARES, 1.0) | {"learning_rate": 1.0, "seed": 2**32 - 1})
    check_ranges({"rank": None, "seed": "none", "lora_alpha": True, "img_sigmas": (0.0, 1.0), "prompts": ["a cat"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype, value):
    tensors = [torch.ones(3, 4, dtype=dtype), torch.zeros(0), torch.full((5,), 60000.0, dtype=dtype)]
    assert all_finite(tensors) and all_finite([])
    tensors[0][2, 1] = value
    assert not all_finite(tensors)
