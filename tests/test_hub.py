"""Folders written by `save_pretrained`, loaded by stock diffusers, and by it as `SVIPipeline`."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline, WanImageToVideoPipeline

from conftest import CLIP as SIZE
from conftest import KINDS, make_components, quiet, seeded
from diffusers_svi import SVIEulerScheduler, SVIPipeline


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", KINDS, indirect=True)
def test_stock_pipelines_load_what_is_saved(kind, pipe, image, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "WanImageToVideoPipeline"
    options = {"image": image, "generator": seeded(), "output_type": "latent", **SIZE}
    for stock in (DiffusionPipeline, WanImageToVideoPipeline):
        loaded = quiet(stock.from_pretrained(tmp_path))
        assert type(loaded) is WanImageToVideoPipeline
        frames = loaded(prompt="a cat sits", **{**options, "generator": seeded()}).frames
    ours = quiet(SVIPipeline.from_pretrained(tmp_path))
    assert type(ours) is SVIPipeline and ours.config.expand_timesteps == pipe.config.expand_timesteps
    assert torch.equal(ours(prompts="a cat sits", **options).frames[0], frames)


def test_the_modular_pipeline_loads_what_is_saved(i2v, tmp_path):
    i2v.save_pretrained(tmp_path)
    modular = ModularPipeline.from_pretrained(str(tmp_path))
    modular.load_components(names="transformer")
    for key, value in i2v.transformer.state_dict().items():
        assert torch.equal(modular.transformer.state_dict()[key], value), key


def test_the_scheduler_is_saved_and_loaded_within_a_pipeline(i2v, tmp_path):
    i2v.scheduler = SVIEulerScheduler(shift=4.0, num_train_timesteps=500)
    i2v.scheduler.set_timesteps(7)
    i2v.save_pretrained(tmp_path)
    for pipeline_class in (SVIPipeline, DiffusionPipeline):
        scheduler = pipeline_class.from_pretrained(tmp_path).scheduler
        assert type(scheduler) is SVIEulerScheduler
        scheduler.set_timesteps(7)
        assert torch.equal(scheduler.sigmas, i2v.scheduler.sigmas)
        assert torch.equal(scheduler.timesteps, i2v.scheduler.timesteps)


def test_a_model_repository_gives_the_pipeline(tmp_path):
    """In a process that has not imported the package; the folder is what `docs/hub.md` makes."""
    pipe = SVIPipeline(**make_components("i2v"))
    pipe.scheduler = SVIEulerScheduler(shift=5.0)
    pipe.save_pretrained(tmp_path / "model")
    shutil.copy(ROOT / "examples" / "hub" / "pipeline.py", tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "named")
    index = tmp_path / "named" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": ["pipeline", "SVIPipeline"]}))
    script = """
from diffusers import DiffusionPipeline
for options in ({"custom_pipeline": "model"}, {}):
    pipe = DiffusionPipeline.from_pretrained("model" if options else "named", trust_remote_code=True, **options)
    print(type(pipe).__module__, type(pipe).__name__, type(pipe.scheduler).__name__)
"""
    homes = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, **homes, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["diffusers_svi.pipeline SVIPipeline SVIEulerScheduler"] * 2
    for pipeline_class in (DiffusionPipeline, SVIPipeline):
        with pytest.raises(ValueError, match="`trust_remote_code=True`"):
            pipeline_class.from_pretrained(tmp_path / "named")
