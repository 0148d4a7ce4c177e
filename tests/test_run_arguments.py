"""What a run may change when it goes on: every argument of the script is of one class, and content is compared."""

import argparse
from pathlib import Path

import pytest

from conftest import load_script, make_transformer
from diffusers_svi.frames import Video
from diffusers_svi.training import run_arguments
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


CLASSES = ("FIXED", "APPLIED", "TOLD", "COMPARED", "FREE")


@pytest.fixture(scope="module")
def arguments() -> dict:
    """All arguments of the script, with their defaults."""
    script = load_script(Path(__file__).parents[1] / "examples" / "train_erft.py")
    given = ["--pretrained_model_name_or_path=x", "--output_dir=y", "--train_data_dir=z", "--hub_token=secret"]
    return describe_arguments(vars(script.parse_args([*given, "--report_to=none"])) | {"report_to": "tensorboard"})


def test_every_argument_is_of_one_class(arguments):
    for name in (*arguments, "hub_token"):
        classes = [kind for kind in CLASSES if name in getattr(run_arguments, kind)]
        assert len(classes) == 1, f"{name} is in {classes}: put it into one class of `run_arguments`."


def test_what_changes_the_lora_is_refused(arguments):
    for name in arguments:
        if name in run_arguments.FIXED:
            message = (
                rf"checkpoint-4 is of a run with other settings: `--{name}` was .*, now 'other'. Give what it was"
            )
            with pytest.raises(ValueError, match=message):
                compare_arguments(arguments, {**arguments, name: "other"}, "checkpoint-4")


def test_all_that_differs_is_named_with_both_values(arguments):
    now = {**arguments, "preset": "film", "rank": 64, "learning_rate": 2e-5}
    with pytest.raises(ValueError, match=r"`--preset` was 'shot', now 'film'; `--rank` was 128, now 64\. Give"):
        compare_arguments(arguments, dict(sorted(now.items())), "checkpoint-4")


def test_the_learning_rate_is_told_and_goes_on(arguments):
    now = {**arguments, "learning_rate": 2e-5, "max_grad_norm": 0.5}
    expected = ["`--learning_rate` was 0.0001, now 2e-05", "`--max_grad_norm` was 1.0, now 0.5"]
    assert compare_arguments(arguments, now, "checkpoint-4") == expected


def test_what_does_not_matter_goes_on(arguments):
    now = {
        name: "other" if name in (*run_arguments.FREE, *run_arguments.COMPARED) else value
        for name, value in arguments.items()
    }
    assert now != arguments and compare_arguments(arguments, now, "checkpoint-4") == []


def test_an_argument_of_no_class_must_be_the_same():
    with pytest.raises(ValueError, match="`--tomorrow` was 1, now 2"):
        compare_arguments({"tomorrow": 1}, {"tomorrow": 2}, "checkpoint-4")
    assert compare_arguments({}, {"tomorrow": 2}, "checkpoint-4") == []


def test_arguments_are_kept_as_json_has_them_without_secrets():
    given = vars(argparse.Namespace(img_sigmas=(0.0, 1.0), lora_alpha=4, hub_token="secret", expert=None))
    assert describe_arguments(given) == {"img_sigmas": [0.0, 1.0], "lora_alpha": 4, "expert": None}


def make_samples(*captions: str, seed: int = 0, height: int = 16) -> Samples:
    videos = [
        Video(name=f"{i}.mp4", caption=caption, num_frames=9, fingerprint="0" * 64, read=None)
        for i, caption in enumerate(captions)
    ]
    return Samples(videos, SampleLayout(num_frames=5, height=height, width=16), seed)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        make_transformer(seed).save_pretrained(folder / name)
    return folder


def test_other_weights_are_refused(model):
    then, now = (describe_content(model, name, make_samples("a cat")) for name in ("transformer", "transformer_2"))
    compare_content(then, dict(then), "checkpoint-4")
    message = "checkpoint-4 is of a run with other settings: `--pretrained_model_name_or_path` had other weights"
    with pytest.raises(ValueError, match=message):
        compare_content(then, now, "checkpoint-4")


def test_other_data_are_refused(model):
    then = describe_content(model, "transformer", make_samples("a cat", "a dog"))
    compare_content(then, describe_content(model, "transformer", make_samples("a cat", "a dog")), "checkpoint-4")
    for captions in (["a cat"], ["a cat", "a dog", "a bird"], ["a cat", "a bird"], ["a dog", "a cat"]):
        now = describe_content(model, "transformer", make_samples(*captions))
        message = rf"the data were others \(2 samples, now {len(captions)}\)"
        with pytest.raises(ValueError, match=message):
            compare_content(then, now, "checkpoint-4")


def test_fewer_steps_than_were_done_are_refused():
    check_steps(4, 4), check_steps(4, 5), check_steps(4, None)
    with pytest.raises(ValueError, match="`--max_train_steps`=3, but the checkpoint is of step 4: give more steps"):
        check_steps(4, 3)


def test_a_finished_run_tells_what_it_was(tmp_path):
    run = {"arguments": {"rank": 4}, "content": {"model": "x"}}
    assert read_run(tmp_path / "arguments.json") is None
    write_run(tmp_path / "arguments.json", run)
    assert read_run(tmp_path / "arguments.json") == run
    for text in ("", "[]", "{}", '{"arguments": 3, "content": {}}', "[" * 100000, "\x00"):
        (tmp_path / "arguments.json").write_text(text)
        with pytest.raises(ValueError, match=r"arguments.json is damaged .*: take it away"):
            read_run(tmp_path / "arguments.json")
