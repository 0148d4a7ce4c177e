"""`examples/train_erft.py`, run as a script on tiny real models: what it writes, that it goes on, what it refuses."""

import json
import logging
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import load_script, make_components, make_transformer, quiet, seeded
from diffusers_svi import HeldLatents, LatentMotion, PixelMotion, SVIPipeline
from diffusers_svi.lora_file import LoraFile, read_lora
from diffusers_svi.training.environment import own_folder
from diffusers_svi.training.model_card import weight_name
from small_videos import write_numbered, write_rows
from svi_tiny import world
from svi_tiny.videos import write_videos


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_erft.py"
CATS = ROOT.parent / "shared" / "data" / "real" / "cats"
TWO_DEEPSPEED = Path(__file__).with_name("two_deepspeed.py")
LORA = "pytorch_lora_weights.safetensors"
SMALL = {
    "height": 64,
    "width": 64,
    "num_frames": 17,
    "fps": world.FPS,
    "rank": 4,
    "bank_capacity": 4,
    "max_sequence_length": 32,
    "report_to": "none",
    "mixed_precision": "no",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with tiny random models of every kind, and one of videos, `world`."""
    folder = tmp_path_factory.mktemp("models")
    write_videos(folder / "world", 4, num_clips=3)
    for kind in ("wan2.1", "a14b", "ti2v-5b", "i2v"):
        SVIPipeline(**make_components(kind)).save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def train_erft():
    """The script as a module: starting it takes longer than what some tests look at."""
    return load_script(SCRIPT)


def command(model: Path, output_dir: Path, launcher: tuple[str, ...] = (), **options) -> list[str]:
    values = {"pretrained_model_name_or_path": model, "output_dir": output_dir, **SMALL}
    values |= {"train_data_dir": model.parent / "world", **options}
    arguments = []
    for name, value in values.items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return [sys.executable, *launcher, str(SCRIPT), *arguments]


def train(
    model: Path,
    output_dir: Path,
    launcher: tuple[str, ...] = (),
    use_cpu: bool = True,
    num_processes: int = 1,
    **options,
) -> str:
    """Run the script and return what it told."""
    if not launcher:
        status, told = run_forked(command(model, output_dir, **options)[1:], num_processes)
        assert status == 0, told[-4000:]
        return told
    # accelerate gives DeepSpeed up where it is told to use the CPU; without a GPU it has no other choice anyway.
    environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if use_cpu else {"DS_ACCELERATOR": "cpu"})}
    arguments = command(model, output_dir, launcher, **options)
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stderr


def failed(model: Path, output_dir: Path, **options) -> str:
    status, told = run_forked(command(model, output_dir, **options)[1:])
    assert status == 1, told[-4000:]
    return told


def run_forked(arguments: list[str], num_processes: int = 1) -> tuple[int, str]:
    """Exit status and output of the script in processes of its own, which need not import everything once more."""
    import deepspeed  # noqa: F401 - which accelerate asks for in each of them

    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            get_context("fork").Process(target=run_script, args=(arguments, output.fileno(), environment))
            for environment in as_launched(num_processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        output.seek(0)
        return next((rank.exitcode for rank in ranks if rank.exitcode), 0), output.read()


def as_launched(num_processes: int) -> list[dict[str, str]]:
    """What `torchrun` tells each process."""
    if num_processes == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    return [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in map(str, range(num_processes))]


def run_script(arguments: list[str], output: int, environment: dict[str, str]) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - closed by the end of the process
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    os.environ.update(environment)
    # As in a process that has just begun.
    logging.getLogger().handlers.clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def last_frames(picture: Path) -> torch.Tensor:
    """Of a film, as levels of 0 to 255."""
    return torch.from_numpy(np.array(PIL.Image.open(picture))).float()


def assert_same(first: Path, second: Path) -> None:
    """The same tensors, bit for bit; the order of a safetensors header is nobody's business."""
    one, other = load_file(first), load_file(second)
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), f"{first.name}: {name}"


@pytest.mark.parametrize(
    ("kind", "preset", "options", "scheme"),
    [
        ("wan2.1", "shot", {}, PixelMotion(1, "reference")),
        ("wan2.1", "film", {"p_motion": 0.5}, PixelMotion(5, "zeros")),
        ("wan2.1", "film-2.0", {"train_batch_size": 2}, PixelMotion(5, "reference")),
        (
            "wan2.1",
            "film",
            {
                **{"p_motion": 0.5, "ref_pad_num": 3, "repeat_first_frame": True, "ref_pad_cfg": True},
                **{"bank_metric": "clean", "error_modulate_factor": 0.2},
            },
            PixelMotion(5, "reference", num_references=3, repeat_first=True, mask_frames="all"),
        ),
        ("a14b", "pro", {"expert": "high", "p_motion": 0.5}, LatentMotion(1)),
        ("a14b", "pro", {"expert": "low", "train_batch_size": 2}, LatentMotion(1)),
        ("ti2v-5b", "ti2v-5b", {"p_text_start": 0.4, "center_crop": True}, HeldLatents(1)),
        ("i2v", "none", {"conditioning": "latent", "reference": "before"}, LatentMotion(1)),
    ],
)
def test_presets_train_what_the_pipeline_loads(models, tmp_path, kind, preset, options, scheme):
    """Four steps, so that errors are banked and injected; the LoRA has learnt and brings its scheme along."""
    printed = train(models / kind, tmp_path, preset=preset, max_train_steps=4, learning_rate=1e-3, **options)
    assert str(scheme) in printed and ("Error bank" in printed) == (preset != "none")
    file = weight_name(options.get("expert"))
    lora = read_lora(tmp_path, file)
    assert lora.conditioning == scheme and lora.expert == options.get("expert")
    assert len(lora.state_dict) == 2 * 2 * 10  # two matrices for each of ten layers of two blocks
    assert {value.dtype for value in lora.state_dict.values()} == {torch.float32}
    assert all(value.abs().max() > 0 for value in lora.state_dict.values())

    pipe = quiet(SVIPipeline.from_pretrained(models / kind))
    pipe.load_lora_weights(str(tmp_path), weight_name=file, load_into_transformer_2=options.get("expert") == "low")
    assert pipe.lora_conditioning == scheme
    image = PIL.Image.new("RGB", (64, 64), "teal")
    size = {"height": 64, "width": 64, "num_frames": 17}
    film = pipe(image=image, prompts="a cat sits", num_clips=2, num_inference_steps=2, generator=seeded(), **size)
    assert len(film.frames[0]) == scheme.film_length(2, 17)
    card = (tmp_path / "README.md").read_text()
    assert ("plain tuning" in card) == (preset == "none")
    compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec")


@pytest.mark.parametrize(
    "bank",
    [
        {},
        {"bank_dtype": "int8", "train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(models, tmp_path, bank):
    """A real kill between two checkpoints, in a later epoch; LoRA, bank and recycler are those of a straight run."""
    options = {"max_train_steps": 9, "checkpointing_steps": 3, "p_clean": 0.3, "bank_capacity": 2, **bank}
    options["latent_cache_dir"] = tmp_path / "cache"
    train(models / "i2v", tmp_path / "straight", **options)

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(models / "i2v", killed, **{**options, "max_train_steps": 100000}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 300
    while not list(killed.glob("checkpoint-[36]")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # It may have come further before the signal reached it: what counts is a checkpoint on the way to step 9.
    for folder in killed.glob("checkpoint-*"):
        if int(re.search(r"\d+", folder.name).group()) > 6:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    told = train(models / "i2v", killed, resume_from_checkpoint="latest", **options)
    assert re.search(rf"Going on from {re.escape(str(killed))}/checkpoint-[36]\.", told)
    assert_same(tmp_path / "straight" / LORA, killed / LORA)
    for name in ("bank-0.safetensors", "recycler-0.safetensors"):
        assert_same(tmp_path / "straight" / "checkpoint-9" / name, killed / "checkpoint-9" / name)
    with safe_open(killed / "checkpoint-9" / "bank-0.safetensors", "pt") as file:
        assert max(json.loads(file.metadata()["counts"])) >= 1
    assert not list(killed.glob("*.unfinished"))


def test_a_run_goes_back_to_an_earlier_checkpoint(models, tmp_path, train_erft):
    """And comes to the same end; what it had come to before is set aside, and another new run is refused."""
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "run", **options)
    (tmp_path / "run" / LORA).rename(tmp_path / LORA)
    with pytest.raises(
        ValueError, match="checkpoints of an earlier run, checkpoint-1, checkpoint-2, checkpoint-3: go on"
    ):
        train_erft.main(train_erft.parse_args(command(models / "i2v", tmp_path / "run", **options)[2:]))

    options |= {"resume_from_checkpoint": "checkpoint-1", "checkpoints_total_limit": 2}
    told = train(models / "i2v", tmp_path / "run", **options)
    assert "checkpoint-2, checkpoint-3 of the earlier branch: moved to" in told
    assert_same(tmp_path / LORA, tmp_path / "run" / LORA)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    aside = tmp_path / "run" / "abandoned-1"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert_same(aside / "checkpoint-3" / LORA, tmp_path / "run" / "checkpoint-3" / LORA)


def test_a_run_goes_on_with_the_settings_it_was_begun_with(models, tmp_path, train_erft):
    """Others are refused before anything is loaded; the learning rate changes; models and data may move."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "latent_cache_dir": cache, "hub_token": "secret"}
    train(models / "i2v", run, **options)
    lora = load_file(run / LORA)
    assert "secret" not in (run / "checkpoint-2" / "manifest.json").read_text() + (run / "arguments.json").read_text()
    write_videos(tmp_path / "others", 3, num_clips=3)
    SVIPipeline(**make_components("i2v") | {"transformer": make_transformer(seed=7)}).save_pretrained(tmp_path / "i2v")
    resume = {**options, "resume_from_checkpoint": "latest"}
    cases = [
        (
            models / "i2v",
            {"preset": "film"},
            "`--preset` was 'shot', now 'film'; `--padding` was 'reference', now 'zeros'",
        ),
        (models / "i2v", {"lora_alpha": 8, "seed": 1}, "`--seed` was 0, now 1; `--lora_alpha` was 4, now 8.0"),
        (models / "i2v", {"max_train_steps": 1}, "`--max_train_steps`=1, but the checkpoint is of step 2"),
        (tmp_path / "i2v", {}, "`--pretrained_model_name_or_path` had other weights"),
        (models / "i2v", {"train_data_dir": tmp_path / "others"}, "the data were others (4 samples, now 3)"),
    ]
    for model, changes, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            train_erft.main(
                train_erft.parse_args(
                    command(model, run, **{"train_data_dir": models / "world", **resume, **changes})[2:]
                )
            )

    shutil.copytree(models / "i2v", tmp_path / "moved" / "i2v")
    shutil.copytree(models / "world", tmp_path / "moved" / "world")
    told = train(tmp_path / "moved" / "i2v", run, **resume | {"max_train_steps": 3, "learning_rate": 0.0})
    assert "Going on, though `--learning_rate` was 0.0001, now 0.0." in told
    # At a learning rate of 0 nothing more is learnt.
    assert all(torch.equal(value, lora[name]) for name, value in load_file(run / LORA).items())


def test_a_run_of_another_preset_is_refused_where_a_lora_lies(models, tmp_path, train_erft):
    options = {"max_train_steps": 1, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["arguments"]["preset"] == "shot"
    with pytest.raises(
        ValueError, match="arguments.json is of a run with other settings: `--preset` was 'shot', now 'film'"
    ):
        arguments = command(models / "i2v", tmp_path / "run", preset="film", **options)
        train_erft.main(train_erft.parse_args(arguments[2:]))
    assert "has a LoRA of an earlier run: it will be replaced" in train(models / "i2v", tmp_path / "run", **options)


BUCKETS = ("64x32x17", "32x64x17", "32x64x9")
BANKS = ("16x5x4x8", "16x5x8x4", "16x3x8x4")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Videos that are wide, tall, and tall and short: three, one and one."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = [(40, 64, 32), (40, 80, 40), (17, 64, 32), (40, 32, 64), (16, 33, 64)]
    for index, (num_frames, width, height) in enumerate(sizes):
        write_numbered(folder / f"{index}.mkv", num_frames, height, width)
    return write_rows(folder / "list.csv", ["video", "text"], *([f"{i}.mkv", f"a cat {i}"] for i in range(5)))


def of_buckets(shapes: Path, cache: Path, *buckets: str) -> dict:
    size = dict.fromkeys(("height", "width", "num_frames"))
    return {**size, "buckets": buckets, "train_data_dir": shapes, "latent_cache_dir": cache, "checkpointing_steps": 2}


@pytest.mark.parametrize("mode", ["local", "sharded"])
def test_two_processes(models, shapes, tmp_path, mode):
    """Data parallel over gloo; a checkpoint holds bank and recycler of each process, and a resumed run is the same.

    The sharded bank, whose errors travel between the processes, is one of three: both have one bucket at a time. So it
    is with blocks on the CPU, and one of the processes makes the film.
    """
    options = {"num_processes": 2, "bank_mode": mode, "samples_per_video": 2, "buffer_warmup_iter": 2}
    options |= {"latent_cache_dir": tmp_path / "cache", "checkpointing_steps": 2}
    banks = [""]
    if mode == "sharded":
        options |= of_buckets(shapes, tmp_path / "cache", *BUCKETS)
        banks = [f"-{shape}" for shape in BANKS]
    train(models / "i2v", tmp_path / "straight", max_train_steps=4, **options)
    shutil.copytree(tmp_path / "straight/checkpoint-2", tmp_path / "again/checkpoint-2")
    PIL.Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    options |= {"validation_prompt": ["a cat"], "validation_image": tmp_path / "start.png"}
    options |= {"validation_inference_steps": 1, "group_offload": True, "gradient_checkpointing": True}
    train(models / "i2v", tmp_path / "again", max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert_same(tmp_path / "straight" / LORA, tmp_path / "again" / LORA)
    assert (tmp_path / "again" / "validation" / "step-4.mp4").is_file()
    for rank in (0, 1):
        for name in (f"recycler-{rank}.safetensors", *(f"bank-{rank}{bank}.safetensors" for bank in banks)):
            assert_same(tmp_path / "straight/checkpoint-4" / name, tmp_path / "again/checkpoint-4" / name)


def test_a_run_of_several_buckets_goes_on_bit_for_bit(models, shapes, tmp_path, train_erft):
    """Every bucket has a bank, within one budget; what goes where is told, and how it was trained too."""
    image = tmp_path / "start.png"
    PIL.Image.new("RGB", (64, 32), "teal").save(image)
    film = {"validation_prompt": ["a cat"], "validation_image": image, "validation_inference_steps": 1}
    options = {**of_buckets(shapes, tmp_path / "cache", *BUCKETS, "48x48x17"), "p_clean": 0.3}
    options |= {"max_train_steps": 5, "train_batch_size": 2, "gradient_accumulation_steps": 2, "bank_capacity": 500}
    # Errors of 2560, 2560, 1536 and 2880 values, in 50 grids, and their sketches.
    options |= {"bank_max_gb": 3.5 * 50 * (2 * (2560 + 2560 + 1536 + 2880) + 4 * 4 * 256) / 1e9}
    told = train(models / "i2v", tmp_path / "straight", **options, **film)
    assert "Videos of each bucket: 64x32x17: 3, 32x64x17: 1, 32x64x9: 1, 48x48x17: 0." in told
    assert "No video goes to 48x48x17: leave it out, and the others have its share of the error bank." in told
    for shape in ("16, 5, 4, 8", "16, 5, 8, 4", "16, 3, 8, 4", "16, 5, 6, 6"):
        assert f"Error bank: 50 grids of 3 errors ({shape}) in bfloat16" in told
    # Three batches an epoch: two samples of the wide ones, and one of each of the others.
    assert "Steps = 5 of 4 samples" in told
    card = (tmp_path / "straight" / "README.md").read_text()
    assert "| buckets | 64x32x17 32x64x17 32x64x9 48x48x17 |" in card and "height=32,\n    width=64" in card
    assert PIL.Image.open(tmp_path / "straight" / "validation" / "step-5.png").size == (64, 32)
    run = json.loads((tmp_path / "straight" / "arguments.json").read_text())["arguments"]
    assert run["buckets"] == [*BUCKETS, "48x48x17"]

    shutil.copytree(tmp_path / "straight/checkpoint-2", tmp_path / "again/checkpoint-2")
    options |= {"resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"`--buckets` was \['64x32x17', .*, now \['64x32x17', '32x64x9'\]"):
        other = {**options, "buckets": ["64x32x17", "32x64x9"]}
        train_erft.main(train_erft.parse_args(command(models / "i2v", tmp_path / "again", **other)[2:]))
    train(models / "i2v", tmp_path / "again", **options)
    assert_same(tmp_path / "straight" / LORA, tmp_path / "again" / LORA)
    counts = []
    for name in (*(f"bank-0-{shape}.safetensors" for shape in (*BANKS, "16x5x6x6")), "recycler-0.safetensors"):
        assert_same(tmp_path / "straight/checkpoint-4" / name, tmp_path / "again/checkpoint-4" / name)
        with safe_open(tmp_path / "again/checkpoint-4" / name, "pt") as file:
            counts.append(sum(json.loads((file.metadata() or {}).get("counts", "[0]"))))
    assert min(counts[:3]) > 0 == counts[3]


def test_both_experts_are_what_each_is_alone(models, tmp_path, train_erft):
    """In turns of two steps, bit for bit, dropout included, and so when one of them was killed in a turn.

    Averages are kept of both, films show both, and blocks that are away between steps change nothing.
    """
    image = tmp_path / "start.png"
    PIL.Image.fromarray(world.render(world.State("blue sky", 0))).save(image)
    film = {"validation_prompt": ["a cat"], "validation_image": image, "validation_inference_steps": 2}
    options = {"preset": "pro", "lora_dropout": 0.5, "max_train_steps": 5, "checkpointing_steps": 3}
    options |= {"latent_cache_dir": tmp_path / "cache", "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    options["use_ema"] = True
    names = {expert: weight_name(expert) for expert in ("high", "low")}
    for expert in names:
        train(models / "a14b", tmp_path / expert, expert=expert, **options)
    both = {**options, "expert": "both", "expert_switch_steps": 2, "validation_steps": 4, **film}
    both |= {"group_offload": True, "gradient_checkpointing": True}
    told = train(models / "a14b", tmp_path / "both", report_to="tensorboard", **both)
    assert "Expert = high noise" in told and "Expert = low noise" in told
    for expert, name in names.items():
        assert_same(tmp_path / expert / name, tmp_path / "both" / name)
        for file in ("bank-0.safetensors", "recycler-0.safetensors", name.replace(f"_{expert}_noise", "")):
            checkpoint = tmp_path / "both" / f"{expert}_noise" / "checkpoint-3"
            assert_same(tmp_path / expert / "checkpoint-3" / file, checkpoint / file)

    # Killed after the checkpoint of the one, in its second turn: the other has none yet. It is that of a run alone.
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "high/checkpoint-3", again / "high_noise/checkpoint-3")
    train(models / "a14b", again, resume_from_checkpoint="latest", **{**both, "validation_steps": None})
    for name in names.values():
        assert_same(tmp_path / "both" / name, again / name)

    # What one of them has done alone is gone on from in a folder of its own, and nowhere else.
    again = tmp_path / "third"
    shutil.copytree(tmp_path / "high/checkpoint-3", again / "checkpoint-3")
    arguments = command(models / "a14b", again, resume_from_checkpoint="latest", **both)
    with pytest.raises(ValueError, match="third has checkpoints of a run with one expert, checkpoint-3: with"):
        train_erft.main(train_erft.parse_args(arguments[2:]))

    # Films are of both, when both have come so far: that of the pipeline with both LoRAs.
    films = sorted(path.name for path in (tmp_path / "both" / "validation").iterdir())
    assert films == [f"step-{step}.{suffix}" for step in (4, 5) for suffix in ("json", "mp4", "png")]
    pipe = quiet(SVIPipeline.from_pretrained(models / "a14b"))
    pipe.load_lora_weights(str(tmp_path / "both"), weight_name=names["high"], weight_name_2=names["low"])
    args = train_erft.parse_args(command(models / "a14b", tmp_path, **{**options, "expert": None, **film})[2:])
    train_erft.log_validation(args, Accelerator(cpu=True), pipe, LatentMotion(1), 5)
    made = [tmp_path / folder / "validation" / "step-5.png" for folder in ("both", "again", ".")]
    assert made[0].read_bytes() == made[1].read_bytes() == made[2].read_bytes()
    card = (tmp_path / "both" / "README.md").read_text()
    assert "| setting | high-noise expert | low-noise expert |" in card and card.count("## Sample\n") == 1
    assert all(f'="{name}"' in card for name in names.values())
    # What is logged is of one run.
    (events,) = (tmp_path / "both" / "logs" / "svi-erft").glob("events.out.tfevents*")
    scalars = EventAccumulator(str(events)).Reload()
    steps = {expert: [event.step for event in scalars.Scalars(f"{expert}/loss")] for expert in names}
    assert steps == {"high": [1, 2, 5, 6, 9], "low": [3, 4, 7, 8, 10]}


def test_every_process_of_a_machine_looks_at_its_share_of_the_memory(models, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**6))  # as `torchrun` tells it
    told = failed(models / "i2v", tmp_path / "run", max_train_steps=1)
    assert "free for each of 1000000 processes. What would fit: " in told, told[-500:]


def under_deepspeed(stage: int, model: Path, folder: Path, **options) -> LoraFile:
    """ZeRO in one process, by the configuration in examples/: it trains, and goes on from a checkpoint bit for bit."""
    config = ROOT / "examples" / "accelerate_configs" / f"deepspeed_zero{stage}.yaml"
    settings = (f"--config_file={config}", "--num_processes=1", "--mixed_precision=no", "--main_process_port=0")
    options |= {"launcher": ("-m", "accelerate.commands.launch", *settings), "use_cpu": False}
    options |= {"latent_cache_dir": folder / "cache", "checkpointing_steps": 1, "max_train_steps": 2}
    told = train(model, folder / "straight", **options)
    assert f"'zero_optimization': {{'stage': {stage}," in told
    shutil.copytree(folder / "straight/checkpoint-1", folder / "again/checkpoint-1")
    train(model, folder / "again", resume_from_checkpoint="latest", **options)
    assert_same(folder / "straight" / LORA, folder / "again" / LORA)
    straight, again = folder / "straight" / "checkpoint-2", folder / "again" / "checkpoint-2"
    assert_same(straight / "bank-0.safetensors", again / "bank-0.safetensors")
    assert (again / "pytorch_model").is_dir()  # what only DeepSpeed writes
    return read_lora(folder / "again", LORA)


def test_deepspeed(models, tmp_path):
    """ZeRO-3; ZeRO-2 is in test_train_conditions.py, with modules."""
    assert len(under_deepspeed(3, models / "i2v", tmp_path).state_dict) == 40


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "a14b",
            {"preset": "pro", "expert": "both"},
            "`--expert both` is not for DeepSpeed, of which accelerate has one engine in a process",
        ),
        (
            "i2v",
            {"group_offload": True, "gradient_checkpointing": True},
            "or give ZeRO-3 `offload_param_device: cpu` instead.",
        ),
    ],
)
def test_what_does_not_go_with_deepspeed_is_told_first(models, tmp_path, monkeypatch, kind, options, message):
    """Before anything is loaded: `accelerate launch` tells of it by these."""
    settings = {"USE_CPU": "false", "USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"}
    for name, value in settings.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert message in failed(models / kind, tmp_path / "run", **options)[-500:]
    assert not (tmp_path / "run" / "cache").exists()


def test_a_film_under_zero3_of_two_processes(models, tmp_path):
    """Neither has all weights, both make it, one writes it: the film that the LoRA makes on the whole base."""
    PIL.Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    options = {"latent_cache_dir": tmp_path / "cache", "max_train_steps": 1, "validation_prompt": ["a cat"]}
    options |= {"validation_image": tmp_path / "start.png", "validation_inference_steps": 1}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TWO_DEEPSPEED), "3")
    told = train(models / "i2v", tmp_path / "run", launcher, use_cpu=False, learning_rate=0.1, **options)
    assert "DistributedType.DEEPSPEED" in told and "Num processes: 2" in told and "'stage': 3" in told
    options |= {"init_lora": tmp_path / "run" / LORA, "learning_rate": 0.0}
    train(models / "i2v", tmp_path / "shown", **options)
    # Numbers are added up in another order, which may be one of 256 levels.
    ours, expected = (last_frames(tmp_path / name / "validation" / "step-1.png") for name in ("run", "shown"))
    assert expected.std() > 10 and (ours - expected).abs().max() <= 1


def test_validation_film_exports_and_checkpoint_limit(models, tmp_path):
    image = tmp_path / "start.png"
    PIL.Image.fromarray(world.render(world.State("blue sky", 0))).save(image)
    told = train(
        models / "wan2.1",
        tmp_path / "run",
        max_train_steps=3,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        export_format="original",
        export_dtype="bfloat16",
        report_to="tensorboard",
        validation_prompt=["a cat sits", "the cat jumps"],
        validation_image=image,
        validation_inference_steps=2,
        validation_steps=2,
        gradient_checkpointing=True,
    )
    run = tmp_path / "run"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    for step in (2, 3):
        with av.open(run / "validation" / f"step-{step}.mp4") as container:
            assert sum(1 for _ in container.decode(video=0)) == PixelMotion(1).film_length(2, 17)
        assert PIL.Image.open(run / "validation" / f"step-{step}.png").size == (2 * 64, 64)
        figures = json.loads((run / "validation" / f"step-{step}.json").read_text())
        assert figures["sharpness_kept"][0] == 1 and len(figures["colour_shift"]) == 2
    # What a step costs: in the log, and told at every checkpoint.
    (events,) = (run / "logs" / "svi-erft").glob("events.out.tfevents*")
    scalars = EventAccumulator(str(events)).Reload()
    parts = ("data", "inject", "forward", "bank", "backward", "optimizer")
    for index in range(3):
        step, *of = (scalars.Scalars(f"seconds/{name}")[index].value for name in ("step", *parts))
        assert min(of) > 0 and step == pytest.approx(sum(of), rel=1e-4)
    assert scalars.Scalars("memory/peak_gb")[0].value > 0.1
    assert all(f"; {left} more take " in told for left in range(3))
    card = (run / "README.md").read_text()
    assert "validation/step-3.png" in card and "sharpness kept" in card and "| p_vid | 0.9 |" in card

    both = [read_lora(run, name) for name in (LORA, "pytorch_lora_weights_original.safetensors")]
    assert both[0].conditioning == both[1].conditioning == PixelMotion(1, "reference")
    assert both[0].state_dict.keys() == both[1].state_dict.keys()
    kept = read_lora(run / "checkpoint-3", LORA)
    dtypes = [{value.dtype for value in lora.state_dict.values()} for lora in (*both, kept)]
    assert dtypes == [{torch.bfloat16}, {torch.bfloat16}, {torch.float32}]
    with safe_open(run / "pytorch_lora_weights_original.safetensors", "pt") as file:
        assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in file.keys()


def test_a_run_that_breaks_ends_at_that_step(models, tmp_path):
    """With a status, and the checkpoint to go on from; what was saved before is left alone."""
    options = {"max_train_steps": 2, "checkpointing_steps": 2, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "run", **options)
    before = (tmp_path / "run" / LORA).read_bytes()
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        tensors = load_file(file)
        if "latents" in tensors:
            tensors["latents"].fill_(float("nan"))
            save_file(tensors, file)
    told = failed(
        models / "i2v", tmp_path / "run", **options | {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    )
    assert "Step 3: the loss is not finite any more. Training ends here, and no such LoRA is saved" in told
    assert "The newest good checkpoint is checkpoint-2: `--resume_from_checkpoint checkpoint-2`." in told
    assert (tmp_path / "run" / LORA).read_bytes() == before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_lora_that_breaks_is_never_saved(models, tmp_path):
    """The loss of this step is still finite: it is the optimizer that breaks the LoRA."""
    options = {"max_train_steps": 1, "checkpointing_steps": 1, "learning_rate": 1.0, "adam_weight_decay": 1e38}
    told = failed(models / "i2v", tmp_path / "run", latent_cache_dir=tmp_path / "cache", **options)
    assert "Step 1: the LoRA is not finite any more." in told and "There is no good checkpoint in" in told
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_layers_and_dropout_of_the_lora(models, tmp_path):
    """What it is for is in the file, and loads; a run with dropout goes on bit for bit."""
    options = {"lora_layers": "self_attn.q,ffn.net.2", "lora_dropout": 0.5, "weighting_scheme": "logit_normal"}
    options |= {"max_train_steps": 3, "checkpointing_steps": 2, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "run", export_format="original", **options)
    lora = read_lora(tmp_path / "run", LORA)
    layers = {name.split(".", 3)[3].rsplit(".lora_")[0] for name in lora.state_dict}
    # It is for training: a film drops nothing out.
    assert layers == {"attn1.to_q", "ffn.net.2"} and lora.adapter_metadata["transformer.lora_dropout"] == 0
    assert (
        read_lora(tmp_path / "run", "pytorch_lora_weights_original.safetensors").state_dict.keys()
        == lora.state_dict.keys()
    )
    pipe = quiet(SVIPipeline.from_pretrained(models / "i2v"))
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name=LORA)
    assert not any(isinstance(module, torch.nn.Dropout) and module.p for module in pipe.transformer.modules())
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(models / "i2v", tmp_path / "again", resume_from_checkpoint="latest", **options)
    assert_same(tmp_path / "run" / LORA, tmp_path / "again" / LORA)
    message = failed(models / "i2v", tmp_path / "third", **options | {"lora_layers": "q,k_img"})
    assert "`--lora_layers`: this model has no add_k_proj. Leave it out." in message


def test_the_average_is_handed_over_and_shown(models, tmp_path):
    """It is that of the LoRAs of all steps, and goes on bit for bit; the film is that of the LoRA that is saved."""
    PIL.Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    options = {"latent_cache_dir": tmp_path / "cache", "validation_prompt": ["a cat"], "validation_inference_steps": 1}
    options |= {"validation_image": tmp_path / "start.png", "learning_rate": 0.1, "checkpointing_steps": 1}
    average = {"use_ema": True, "ema_decay": 0.2, "max_train_steps": 3, **options}
    train(models / "i2v", tmp_path / "run", **average)
    lora = read_lora(tmp_path / "run", LORA).state_dict
    first, second, third = (read_lora(tmp_path / "run" / f"checkpoint-{n}", LORA).state_dict for n in (1, 2, 3))
    for name, value in lora.items():
        # Kept are 0, (1 + 1) / (10 + 1), and the smaller of (1 + 2) / (10 + 2) and 0.2.
        expected = 0.2 * (2 / 11 * first[name] + 9 / 11 * second[name]) + 0.8 * third[name]
        torch.testing.assert_close(value, expected)
        assert not torch.equal(value, third[name])
    assert "| ema_decay | 0.2 |" in (tmp_path / "run" / "README.md").read_text()

    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(models / "i2v", tmp_path / "again", resume_from_checkpoint="latest", **average)
    assert_same(tmp_path / "run" / LORA, tmp_path / "again" / LORA)
    options |= {"init_lora": tmp_path / "run" / LORA, "max_train_steps": 1, "learning_rate": 0.0}
    train(models / "i2v", tmp_path / "shown", **options)
    assert "ema_decay" not in (tmp_path / "shown" / "README.md").read_text()
    films = [tmp_path / name / "validation" / f"step-{n}.png" for name, n in (("run", 3), ("again", 3), ("shown", 1))]
    ours, again, expected = map(last_frames, films)
    assert expected.std() > 10 and torch.equal(ours, expected) and torch.equal(again, expected)


def test_a_base_quantized_by_torchao(models, tmp_path):
    """The LoRA goes on bit for bit, differs from one of other bits, and chains clips on the full base."""
    pytest.importorskip("torchao")
    options = {"max_train_steps": 2, "checkpointing_steps": 1, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "other", quantize_base="fp8", **options)
    train(models / "i2v", tmp_path / "run", quantize_base="int8", **options)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    train(models / "i2v", tmp_path / "again", quantize_base="int8", resume_from_checkpoint="latest", **options)
    assert_same(tmp_path / "run" / LORA, tmp_path / "again" / LORA)
    assert "| quantize_base | int8 |" in (tmp_path / "run" / "README.md").read_text()
    lora, other = (read_lora(tmp_path / name, LORA).state_dict for name in ("run", "other"))
    assert lora.keys() == other.keys() and {value.dtype for value in lora.values()} == {torch.float32}
    assert not any(torch.equal(value, other[name]) for name, value in lora.items() if ".lora_B." in name)
    pipe = quiet(SVIPipeline.from_pretrained(models / "i2v"))
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name=LORA)
    image = PIL.Image.new("RGB", (64, 64), "teal")
    size = {"height": 64, "width": 64, "num_frames": 17}
    film = pipe(image=image, prompts="a cat sits", num_clips=2, num_inference_steps=1, generator=seeded(), **size)
    assert len(film.frames[0]) == PixelMotion(1).film_length(2, 17)


def test_compiled_blocks(models, tmp_path, capfd):
    """Every step is the same, bit for bit where nothing is fused, and none but the first waits for a compiler."""
    options = {"max_train_steps": 3, "latent_cache_dir": tmp_path / "cache", "gradient_checkpointing": True}
    train(models / "i2v", tmp_path / "plain", **options)
    torch.compiler.reset()  # of what was compiled in this process before
    torch.compiler.set_default_backend("aot_eager")
    torch._logging.set_logs(recompiles=True)
    try:
        train(models / "i2v", tmp_path / "compiled", compile=True, group_offload=True, **options)
    finally:
        torch.compiler.set_default_backend(None)
        torch._logging.set_logs()
    assert_same(tmp_path / "plain" / LORA, tmp_path / "compiled" / LORA)
    # What the first block is given needs no gradient, so once the others are compiled anew.
    assert capfd.readouterr().err.count("Recompiling function forward") == 1


def test_a_variant_with_its_encoders_and_blocks_offloaded(models, tmp_path):
    """The same LoRA, bit for bit, and film as with everything in place; tiles make latents of their own."""
    SVIPipeline.from_pretrained(models / "wan2.1").save_pretrained(tmp_path / "fp32", variant="fp32")
    assert (tmp_path / "fp32" / "vae" / "diffusion_pytorch_model.fp32.safetensors").is_file()
    image = tmp_path / "start.png"
    PIL.Image.fromarray(world.render(world.State("blue sky", 0))).save(image)
    film = {"validation_prompt": ["a cat sits"], "validation_image": image, "validation_inference_steps": 1}
    options = {"max_train_steps": 1, "train_data_dir": models / "world", **film}
    blocks = {"group_offload": True, "gradient_checkpointing": True}
    train(models / "wan2.1", tmp_path / "plain", **options)
    train(tmp_path / "fp32", tmp_path / "offloaded", variant="fp32", offload=True, **blocks, **options)
    assert_same(tmp_path / "plain" / LORA, tmp_path / "offloaded" / LORA)
    plain, offloaded = (last_frames(tmp_path / name / "validation" / "step-1.png") for name in ("plain", "offloaded"))
    assert torch.equal(plain, offloaded)
    cache = tmp_path / "plain" / "cache"
    entries = len(list(cache.rglob("*.safetensors")))
    options |= {"latent_cache_dir": cache, "validation_prompt": None, "validation_image": None}
    train(models / "wan2.1", tmp_path / "tiled", enable_tiling=True, **options)
    assert len(list(cache.rglob("*.safetensors"))) == 2 * entries


def test_schedule_and_films_by_epochs(models, tmp_path, train_erft):
    """Four samples an epoch: films at its end. The learning rate is that of all samples of a step, and decays."""
    image = tmp_path / "start.png"
    PIL.Image.fromarray(world.render(world.State("blue sky", 0))).save(image)
    options = {"lr_scheduler": "polynomial", "lr_power": 2.0, "learning_rate": 1e-3, "scale_lr": True}
    options |= {"train_batch_size": 2, "num_train_epochs": 2, "validation_epochs": 1, "checkpointing_steps": 3}
    options |= {"validation_prompt": ["a cat"], "validation_image": image, "validation_inference_steps": 1}
    train(models / "i2v", tmp_path / "run", report_to="none", **options)
    films = sorted(path.name for path in (tmp_path / "run" / "validation").glob("*.mp4"))
    assert films == ["step-2.mp4", "step-4.mp4"]
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "scheduler.bin", weights_only=True)
    # source: get_polynomial_decay_schedule_with_warmup, which ends at 1e-7
    assert state["base_lrs"] == [2e-3]
    assert state["_last_lr"][0] == pytest.approx((2e-3 - 1e-7) * (1 - 3 / 4) ** 2 + 1e-7)


def test_a_validation_film_has_the_schedule_of_the_training(models, tmp_path, train_erft):
    """That of the card, whatever scheduler the base model comes with."""
    options = {"validation_prompt": ["a cat"], "validation_image": tmp_path / "start.png", "flow_shift": 4}
    PIL.Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    options |= {"validation_inference_steps": 2}
    args = train_erft.parse_args(command(models / "i2v", tmp_path, **options)[2:])
    pipe = quiet(SVIPipeline.from_pretrained(models / "i2v"))
    levels = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: levels.append(float(kwargs["timestep"].flatten()[0]) / 1000), with_kwargs=True
    )
    train_erft.log_validation(args, Accelerator(cpu=True), pipe, PixelMotion(1), 0)
    # s * u / (1 + (s - 1) * u) at u = 1 and 1/2, each with and without the prompt.
    assert levels == pytest.approx([1.0, 1.0, 0.8, 0.8], abs=1e-4)


def test_it_goes_on_from_a_lora(models, tmp_path):
    options = {"max_train_steps": 1, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "first", preset="none", **options)
    given = read_lora(tmp_path / "first", LORA)
    # Half the alpha, and no learning: what comes out is the same LoRA, with B twice as large.
    options |= {"init_lora": tmp_path / "first" / LORA, "lora_alpha": 2, "learning_rate": 0.0}
    train(models / "i2v", tmp_path / "second", **options)
    made = read_lora(tmp_path / "second", LORA).state_dict
    for name, value in given.state_dict.items():
        torch.testing.assert_close(made[name], value * (2 if ".lora_B." in name else 1), rtol=0, atol=0)
    message = failed(models / "i2v", tmp_path / "third", **{**options, "rank": 2})
    assert "has rank 4, but `--rank` is 2" in message
    message = failed(models / "i2v", tmp_path / "third", **{**options, "init_lora": tmp_path / "none.safetensors"})
    assert "No LoRA could be read" in message


def test_a_lower_rank_is_exported(models, tmp_path):
    options = {"max_train_steps": 1, "latent_cache_dir": tmp_path / "cache"}
    train(models / "i2v", tmp_path / "first", preset="none", lora_alpha=8, **options)
    first = read_lora(tmp_path / "first", LORA).state_dict
    options |= {"init_lora": tmp_path / "first" / LORA, "lora_alpha": 8, "learning_rate": 0.0}
    for rank in (4, 2):
        train(models / "i2v", tmp_path / str(rank), export_rank=rank, **options)
        lora = read_lora(tmp_path / str(rank), LORA)
        assert lora.adapter_metadata["transformer.r"] == lora.adapter_metadata["transformer.lora_alpha"] == rank
        for name in [name for name in first if ".lora_A." in name]:
            up = name.replace(".lora_A.", ".lora_B.")
            trained, exported = 2 * first[up] @ first[name], lora.state_dict[up] @ lora.state_dict[name]
            lost = torch.linalg.svdvals(trained)[rank:].norm()
            assert lora.state_dict[name].shape[0] == rank
            torch.testing.assert_close((trained - exported).norm(), lost, rtol=1e-3, atol=1e-6)
    assert "| export_rank | 2 |" in (tmp_path / "2" / "README.md").read_text()


def test_training_from_the_cache_encodes_nothing(models, tmp_path):
    first = train(models / "i2v", tmp_path / "one", max_train_steps=1, latent_cache_dir=tmp_path / "cache")
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    # Samples of the clips and the captions, and the empty prompt.
    assert len(entries) > 4 and "Saved" in first
    train(models / "i2v", tmp_path / "two", max_train_steps=1, latent_cache_dir=tmp_path / "cache")
    assert entries == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}


@pytest.mark.skipif(not CATS.is_dir(), reason="the real clips are not beside this checkout")
def test_real_clips(models, tmp_path):
    options = {"train_data_dir": CATS, "height": 48, "width": 80, "num_frames": 9}
    train(models / "wan2.1", tmp_path, preset="film", max_train_steps=2, samples_per_video=2, **options)
    assert read_lora(tmp_path, LORA).conditioning == PixelMotion(5, "zeros")


def test_skipped_videos_are_told(models, tmp_path):
    rows = [[f"{index}.mp4", "a cat"] for index in range(3)]
    folder = write_rows(tmp_path / "videos" / "videos.csv", ["video", "text"], *rows)
    for index in range(3):
        write_numbered(folder / f"{index}.mp4", num_frames=20 if index else 4)
    told = train(
        models / "i2v",
        tmp_path / "run",
        train_data_dir=folder,
        max_skipped_share=0.4,
        preset="none",
        max_train_steps=1,
    )
    reason = "1 of 3 videos are not used. 1 too short: 0.mp4 (4 frames at 8 a second, 17 needed)."
    assert "WARNING" in told and reason in told


def test_a_mistake_in_the_arguments_is_one_line(models, tmp_path, train_erft, capsys):
    cases = [
        ({"train_data_dir": None}, "Give one of `--train_data_dir` and `--dataset_name`, got none."),
        ({"dataset_name": "cats"}, "Give one of `--train_data_dir` and `--dataset_name`, got both."),
        ({"p_vid": 1.5}, "`p_vid` is a probability"),
        ({"p_motion": -1}, "`--p_motion` is a share in [0, 1], got -1.0."),
        ({"rank": 0}, "`--rank` must be at least 1, got 0."),
        ({"learning_rate": 1e30}, "`--learning_rate` must be between 0 and 1, got 1e+30."),
        ({"report_to": "wandbb"}, "`--report_to` must be one of"),
        ({"checkpoints_total_limit": -1}, "`--checkpoints_total_limit` must be at least 1, got -1."),
        ({"export_rank": 5}, "must be between 1 and 4, got 5."),
        ({"conditioning": "latent"}, "`--reference`=inside"),
        ({"preset": "pro", "reference": "inside"}, "Use `--reference before`"),
        ({"expert": "both", "init_lora": __file__}, "but `--expert both` begins with two: give the folder that has"),
        ({"p_text_start": 0.5}, "needs `--conditioning held`"),
        ({"ref_pad_num": -2}, "`--ref_pad_num` must be -1 for all, 0 for none, or a number of frames, got -2."),
        ({"preset": "pro", "mask_frames": "all"}, "are for `--conditioning pixel`, got latent."),
        ({"error_modulate_factor": 1.5}, "`modulation` must be in [0, 1]"),
        ({"validation_prompt": ["a cat"]}, "needs both"),
        (
            {"validation_prompt": ["a cat"], "validation_image": "no.png"},
            "`--validation_image`='no.png' is not a file.",
        ),
        ({"report_to": "wandb", "hub_token": "secret"}, "use `hf auth login` instead"),
        *([] if torch.cuda.is_available() else [({"quantize_base": "4bit"}, "needs a GPU")]),
        ({"buckets": ["64x64"]}, "`--height`=64 is not for `--buckets`"),
        ({"buckets": ["64"], "height": None, "width": None}, "got '64'."),
        ({"num_frames": 16}, "`num_frames` must be 1, 5, 9, ..., got 16."),
        ({"fps": 0}, "`fps` must be a whole number of at least 1, got 0."),
    ]
    for options, message in cases:
        with pytest.raises(SystemExit) as exit:
            train_erft.parse_args(command(models / "i2v", tmp_path / "run", **options)[2:])
        told = capsys.readouterr().err
        assert exit.value.code == 1 and message in told and told.count("\n") == 1
    told = failed(models / "i2v", tmp_path / "run", rank=0)
    assert "Traceback" not in told and told.endswith("train_erft.py: `--rank` must be at least 1, got 0.\n")


def test_mistakes_are_told_before_anything_is_trained(models, tmp_path, train_erft):
    cases = [
        ("i2v", {"expert": "high"}, "only one transformer"),
        ("a14b", {}, "two experts"),
        ("i2v", {"expert": "both"}, "`--expert both`: this model has only one transformer."),
        ("i2v", {"preset": "ti2v-5b"}, "expand_timesteps=True"),
        ("world", {}, "has no model_index.json: is it in diffusers' layout?"),
        ("i2v", {"train_data_dir": tmp_path / "nothing"}, "nothing"),
        ("i2v", {"resume_from_checkpoint": "checkpoint-7"}, "is no checkpoint"),
        ("i2v", {"bank_capacity": 10**12}, "What would fit"),
        ("i2v", {"height": 72}, "`--height` must be a multiple of 16 for this model, got 72."),
        ("ti2v-5b", {"preset": "ti2v-5b", "width": 48}, "`--width` must be a multiple of 32 for this model, got 48."),
        (
            "i2v",
            {"buckets": ["64x64", "64x72"], "height": None, "width": None},
            "`--buckets` 64x72x17: the height must be a multiple of 16 for this model, got 72.",
        ),
        ("i2v", {"bank_capacity": 10**9, "bank_path": tmp_path / "bank"}, "a `path` on a larger disk"),
        (
            "i2v",
            {"bank_path": models / "i2v" / "model_index.json" / "bank"},
            "`--bank_path`: nothing can be written to",
        ),
        ("i2v", {"latent_cache_dir": models / "i2v" / "model_index.json"}, "`--latent_cache_dir`: nothing can be"),
    ]
    for kind, options, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            train_erft.main(train_erft.parse_args(command(models / kind, tmp_path / "run", **options)[2:]))
    with (
        own_folder("--output_dir", tmp_path / "run"),
        pytest.raises(ValueError, match=re.escape(f"`--output_dir`='{tmp_path / 'run'}' is used by another run")),
    ):
        train_erft.main(train_erft.parse_args(command(models / "i2v", tmp_path / "run")[2:]))
    # None of them has come as far as the data.
    assert not list((tmp_path / "run" / "cache").iterdir())
    with pytest.raises(ValueError, match="`--output_dir`: nothing can be written to"):
        train_erft.main(train_erft.parse_args(command(models / "i2v", models / "i2v" / "model_index.json")[2:]))


@pytest.mark.parametrize(
    ("options", "fps", "film"),
    [([], 16, 16), (["--preset=ti2v-5b"], 24, 24), (["--fps=8"], 8, 8), (["--fps=none"], None, 16)],
)
def test_the_rate_of_clips_and_films(train_erft, tmp_path, options, fps, film):
    base = ["--pretrained_model_name_or_path=x", f"--output_dir={tmp_path}", "--train_data_dir=z"]
    args = train_erft.parse_args([*base, *options])
    scheme = train_erft.make_scheme(args)
    assert train_erft.make_layouts(args, scheme)[0].fps == fps and train_erft.film_fps(args) == film
    train_erft.save_model_card(args, scheme, "someone/svi", None)
    assert f'"film.mp4", film, fps={film})' in (tmp_path / "README.md").read_text()


def test_help_tells_the_defaults(train_erft, capsys):
    with pytest.raises(SystemExit):
        train_erft.parse_args(["--help"])
    told = capsys.readouterr().out
    assert "Samples a step and process. (default: 1)" in told
    assert "(default: None)" not in told and "(default: False)" not in told


def test_names_known_from_elsewhere(train_erft):
    names = ["--y_prob=0.1", "--latent_prob=0.2", "--noise_prob=0.3", "--clean_prob=0.4", "--y_error_num=2"]
    names += ["--error_buffer_k=7", "--buffer_replacement_strategy=l2_batch", "--p_motion_threshold=0.5"]
    base = ["--pretrained_model_name_or_path=x", "--output_dir=y", "--train_data_dir=z"]
    args = train_erft.parse_args([*base, *names])
    assert (args.p_img, args.p_vid, args.p_noi, args.p_clean, args.n_img) == (0.1, 0.2, 0.3, 0.4, 2)
    assert (args.bank_capacity, args.bank_replacement, args.p_motion) == (7, "l2", 0.5)
    for count, padding in ((0, ("zeros", None)), (-1, ("reference", None)), (4, ("reference", 4))):
        scheme = train_erft.make_scheme(train_erft.parse_args([*base, f"--ref_pad_num={count}"]))
        assert (scheme.padding, scheme.num_references, scheme.mask_frames) == (*padding, "first")
