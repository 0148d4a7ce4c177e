"""LoRAs and models on a Hub: a real server, the training script, the pipeline and `hf` in processes of their own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image
import pytest
from huggingface_hub import HfApi

from diffusers_svi import LatentMotion
from diffusers_svi.lora_file import read_lora
from diffusers_svi.training.model_card import TrainedLora, write_model_card
from diffusers_svi.training.push import push_command
from test_train_erft import command, models  # noqa: F401 - a fixture


SERVER = Path(__file__).with_name("hub_server.py")
LORA = "pytorch_lora_weights.safetensors"
HIGH, LOW = (f"pytorch_lora_weights_{expert}_noise.safetensors" for expert in ("high", "low"))
TRAINED = {"preset": "pro", "max_train_steps": 2, "push_to_hub": True, "hub_model_id": "film"}


@dataclass
class Hub:
    """A server that runs, and the process to end it by."""

    address: str
    process: subprocess.Popen
    home: Path

    def api(self, user: str | None = None) -> HfApi:
        return HfApi(endpoint=self.address, token=f"hf_{user}" if user else False)

    def run(self, arguments: list[str], user: str | None = None, cwd: Path | None = None) -> tuple[int, str]:
        """Exit status and output of a command that knows this Hub, and is logged in as `user`."""
        values = {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.home)}
        values |= {"HF_TOKEN": f"hf_{user}"} if user else {}
        values |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "ACCELERATE_USE_CPU": "true"}
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(arguments, cwd=cwd, env={**known, **values}, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def python(self, script: str, user: str | None = None, cwd: Path | None = None) -> str:
        status, told = self.run([sys.executable, "-c", script], user, cwd)
        assert status == 0, told[-4000:]
        return told


def start_hub(home: Path, *arguments: str) -> Hub:
    process = subprocess.Popen([sys.executable, str(SERVER), *arguments], stdout=subprocess.PIPE, text=True)
    return Hub(process.stdout.readline().strip(), process, home)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    hub = start_hub(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub
    hub.process.kill()
    hub.process.wait()


@pytest.fixture(scope="module")
def pushed(hub, models, tmp_path_factory) -> Path:  # noqa: F811
    """Two runs, in folders of their own, on a private model of the Hub: an expert each, into one repository."""
    folder = tmp_path_factory.mktemp("pushed")
    hub.api("alice").create_repo("alice/wan", private=True)
    hub.api("alice").upload_folder(repo_id="alice/wan", folder_path=models / "a14b")
    PIL.Image.new("RGB", (64, 64), "teal").save(folder / "start.png")
    options = {**TRAINED, "validation_image": folder / "start.png", "validation_prompt": ["a cat sits"]}
    options |= {"validation_inference_steps": 1, "flow_shift": 4, "pretrained_model_name_or_path": "alice/wan"}
    for expert in ("high", "low"):
        arguments = command(models / "a14b", folder / expert, expert=expert, **options)
        status, told = hub.run([*arguments, f"--latent_cache_dir={folder / 'cache'}"], "alice")
        assert status == 0, told[-4000:]
    return folder


def test_both_experts_end_in_one_repository_with_card_and_films(hub, pushed):
    files = hub.api("alice").list_repo_files("alice/film")
    told = [name.replace(".safetensors", ".json") for name in (HIGH, LOW)]
    films = [
        f"validation/{expert}_noise/step-2.{suffix}" for expert in ("high", "low") for suffix in ("json", "mp4", "png")
    ]
    assert sorted(files) == sorted(["README.md", HIGH, LOW, *told, *films])
    for name, folder in ((HIGH, "high"), (LOW, "low"), (films[1], "high"), ("README.md", "low")):
        there = hub.api("alice").hf_hub_download("alice/film", name, cache_dir=pushed / "there")
        assert Path(there).read_bytes() == (pushed / folder / name).read_bytes()
    card = (pushed / "low" / "README.md").read_text()
    assert f'weight_name="{HIGH}",\n    weight_name_2="{LOW}",\n' in card
    assert "| expert | high | low |" in card and "base_model: alice/wan" in card
    assert "(validation/high_noise/step-2.png)" in card and "(validation/low_noise/step-2.mp4)" in card


def test_the_card_is_a_recipe(hub, pushed, tmp_path):
    """Its code, word for word but for the GPU and the number of steps, brings model, scheme and both experts."""
    card = (pushed / "low" / "README.md").read_text()
    shutil.copy(pushed / "start.png", tmp_path)
    code = card.split("```python\n")[1].split("```")[0].replace('.to("cuda")', "")
    code = code.replace("film = pipe(\n", "film = pipe(\n    num_inference_steps=2,\n")
    code += """
layers = [[name for name in part.state_dict() if "lora_A" in name] for part in (pipe.transformer, pipe.transformer_2)]
print("told:", pipe.lora_conditioning, *map(len, layers), pipe.vae.dtype, pipe.transformer.dtype, len(film))
print("told:", type(pipe.scheduler).__name__, pipe.scheduler.config.shift)
"""
    told = re.findall(r"told: (.*)", hub.python(code, "alice", tmp_path))
    length = LatentMotion(1).film_length(2, 17)
    assert told[0] == f"LatentMotion(num_latents=1) 20 20 torch.float32 torch.bfloat16 {length}"
    assert told[1] == "SVIEulerScheduler 4.0" and (tmp_path / "film.mp4").stat().st_size > 0


def test_what_is_private_is_for_those_with_a_token(hub, pushed, tmp_path):
    """Without a file's name, too; everybody else is told in a sentence what to do, in an error without a history."""
    empty = replace(hub, home=tmp_path)
    hub.api("alice").create_repo("alice/own", private=True)
    hub.api("alice").upload_file(path_or_fileobj=pushed / "high" / HIGH, path_in_repo=HIGH, repo_id="alice/own")
    script = f"""
import traceback
from diffusers_svi import SVIPipeline
from diffusers_svi.lora_file import read_lora
from diffusers_svi.training.push import download_model

for what in (
    lambda: read_lora("alice/own").name,
    lambda: read_lora("alice/own", token="hf_alice").expert,
    lambda: read_lora("alice/own", "{HIGH}", token="hf_alice").conditioning,
    lambda: read_lora("alice/own", "{HIGH}", token="hf_bob", cache_dir="none").name,
    lambda: read_lora("alice/own", "nothing.safetensors", token="hf_alice").name,
    lambda: read_lora("alice/film", token="hf_alice").name,
    lambda: SVIPipeline.from_pretrained("alice/wan"),
    lambda: type(SVIPipeline.from_pretrained("alice/wan", token="hf_alice")).__name__,
    lambda: download_model("alice/wan", cache_dir="none"),
):
    try:
        print("told:", what())
    except Exception as error:
        print("told:", type(error).__name__, traceback.format_exc().count("Traceback"), str(error).replace("\\n", " "))
"""
    told = re.findall(r"told: (.*)", empty.python(script, cwd=tmp_path))
    hidden = (
        f"{hub.address} shows no repository 'alice/{{}}' to this user: is the name right? If it is private, log in"
    )
    assert told[0].startswith(f"ValueError 1 No LoRA could be read from 'alice/own'. {hidden.format('own')}")
    assert told[1:3] == ["high", "LatentMotion(num_latents=1)"]
    assert hidden.format("own") in told[3] and "token of somebody who may read it" in told[3]
    assert "does not appear to have a file named nothing.safetensors" in told[4]
    assert f"It has several files, '{HIGH}', '{LOW}'. Give a safetensors file, or" in told[5]
    assert told[6].startswith(f"OSError 1 Cannot load the model 'alice/wan'. {hidden.format('wan')}")
    assert told[7] == "SVIPipeline"
    assert told[8].startswith("ValueError 1 'alice/wan' is no folder, and no model of the Hub: ")
    assert hidden.format("wan") in told[8]


def test_a_repository_that_cannot_be_pushed_to_is_known_before_training(hub, pushed, tmp_path):
    hub.api("bob").create_repo("bob/taken")
    script = """
import sys
from huggingface_hub import constants
from diffusers_svi import LatentMotion, PixelMotion
from diffusers_svi.training.push import open_repo

def attempt(name, token, expert=None, scheme=LatentMotion(1)):
    try:
        print("told:", open_repo(name, sys.argv[1], scheme, expert, token))
    except ValueError as error:
        print("told:", str(error).replace("\\n", " "))

attempt("new", "hf_alice")
attempt("new", "hf_alice")
attempt("new", None)
attempt("bob/taken", "hf_alice")
attempt("bob/other", "hf_alice")
attempt("film", "hf_alice", "high")
attempt("film", "hf_alice", "high", PixelMotion(1))
constants.ENDPOINT = "http://127.0.0.1:9"
attempt("new", "hf_alice")
"""
    script = script.replace("sys.argv[1]", repr(str(tmp_path)))
    told = re.findall(r"told: (.*)", hub.python(script))
    begin = "Nothing could be pushed to the repository "
    assert told[:2] == ["alice/new", "alice/new"]
    assert told[2].startswith(begin + "'new': ") and "log in with `hf auth login`" in told[2]
    assert (
        told[3] == begin + "'bob/taken': This user may not write to the repository 'bob/taken': choose a name of "
        "your own, or a token that may write there."
    )
    assert "may not write to the repository 'bob/other'" in told[4]
    assert told[5] == "alice/film"
    assert told[6].startswith(
        "The repository 'alice/film' has the low-noise expert for LatentMotion(num_latents=1), but this one is to be "
        "for PixelMotion(num_frames=1, padding='zeros')"
    )
    assert told[7].startswith(begin + "'new': http://127.0.0.1:9 cannot be reached (")


def test_experts_trained_at_the_same_time_end_on_one_card(hub, tmp_path):
    """Neither knows of the other when it begins. One that was trained in the folder counts, not what the Hub has."""
    script = """
from pathlib import Path
from huggingface_hub import hf_hub_download
from diffusers_svi import LatentMotion
from diffusers_svi.training.model_card import TrainedLora, description_name, weight_name
from diffusers_svi.training.push import open_repo, push

def train(folder, expert, seed):
    settings = {"height": 64, "width": 64, "num_frames": 17, "fps": 16, "flow_shift": 5.0, "seed": seed}
    lora = TrainedLora(base_model="a/b", scheme=LatentMotion(1), method="so", settings=settings, expert=expert)
    lora.save(folder)
    (Path(folder) / weight_name(expert)).write_bytes(seed.encode())

def tell(folder, expert):
    push(folder, "alice/pair", expert)
    card = Path(hf_hub_download("alice/pair", "README.md")).read_text()
    print("told:", *(line for line in card.splitlines() if line.startswith("| seed") or "weight_name" in line))

for expert in ("high", "low"):
    Path(expert).mkdir()
    open_repo("pair", expert, LatentMotion(1), expert)
for expert in ("high", "low"):
    train(expert, expert, f"seed-{expert}")
    tell(expert, expert)

train("low", "high", "another")
tell("low", "low")

# What an earlier repository told of the other expert is not true of a new one.
open_repo("new", "high", LatentMotion(1), "high")
print("told:", (Path("high") / description_name("low")).exists())
"""
    told = re.findall(r"told: (.*)", hub.python(script, "alice", tmp_path))
    both = f'    weight_name="{HIGH}",     weight_name_2="{LOW}", '
    assert told[0] == f'    weight_name="{HIGH}", | seed | seed-high |'
    assert told[1:] == [f"{both}| seed | seed-high | seed-low |", f"{both}| seed | another | seed-low |", "False"]


def test_the_hub_is_gone_when_the_lora_is_there(models, hub, tmp_path):  # noqa: F811
    """The run ends with status 1; the LoRA is whole, and the command that is told pushes it."""
    gone = start_hub(tmp_path / "home", "--ends_at", "/commit/")
    try:
        options = {**TRAINED, "preset": "shot", "hub_model_id": "late"}
        status, told = gone.run(command(models / "i2v", tmp_path / "run", **options), "alice")
        assert gone.process.wait() == 0
    finally:
        gone.process.kill()
    assert status == 1 and "Traceback" not in told, told[-4000:]
    lora = tmp_path / "run" / LORA
    assert f"The LoRA is whole, as {lora}, but not on the Hub." in told
    assert len(read_lora(lora).state_dict) == 40
    line = push_command(tmp_path / "run", "alice/late")
    assert f"\n\n    {line}\n" in told

    hf = shlex.split(line)
    hf[0] = shutil.which("hf", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    status, told = hub.run(hf, "alice")
    assert status == 0, told[-4000:]
    files = hub.api("alice").list_repo_files("alice/late")
    assert sorted(files) == ["README.md", LORA.replace(".safetensors", ".json"), LORA]


def test_a_damaged_description_is_no_card(tmp_path):
    settings = {"height": 64, "width": 64, "num_frames": 17, "fps": 16, "flow_shift": 5.0}
    TrainedLora(base_model="a/b", scheme=LatentMotion(1), method="by hand", settings=settings).save(tmp_path)
    file = tmp_path / "pytorch_lora_weights.json"
    for damage in ({"scheme": {"scheme": "None"}}, {"more": 1}, {"settings": {"height": 64}}):
        values = json.loads(file.read_text())
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / file.name).write_text(json.dumps({**values, **damage}))
        with pytest.raises(ValueError, match="pytorch_lora_weights.json does not tell of a LoRA: .* Delete it"):
            write_model_card(tmp_path / "damaged", "me/lora")
