"""A film that two real processes make together over gloo: Ulysses, the context parallelism of diffusers."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from diffusers_svi import FilmWriter
from diffusers_svi.memory import model_shapes
from test_caches import make_pipe, stream
from test_matrix import START


TESTS = Path(__file__).parent
KINDS = ("wan2.1", "a14b")
WORKER = """
import json, os, sys
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers_svi import FilmWriter
from diffusers_svi.lora_layers import experts_of
from test_caches import make_pipe, stream
from test_matrix import START

folder, second = Path(sys.argv[1]), os.fork()  # once all is imported
rank = 0 if second else 1
meeting = {"init_method": f"file://{folder}/meeting", "timeout": timedelta(seconds=300)}
dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)


def share(transformer, **options):
    # What `enable_parallelism` does, which asks for an accelerator.
    parallel = ContextParallelConfig(ulysses_degree=2, **options)
    config = ParallelConfig(context_parallel_config=parallel)
    mesh = dist.device_mesh.init_device_mesh("cpu", parallel.mesh_shape, mesh_dim_names=parallel.mesh_dim_names)
    config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    transformer._parallel_config = config
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(transformer, parallel, transformer._cp_plan)


told = {}
for kind, options in {"wan2.1": {"ulysses_anything": True}, "a14b": {}}.items():
    pipe, tokens = make_pipe(kind), set()
    for transformer in experts_of(pipe).values():
        share(transformer, **options)
        transformer.blocks[1].register_forward_pre_hook(lambda block, inputs: tokens.add(inputs[0].shape[1]))
    for clips in (1, 3):
        # One process has the file, and tells the other where the film is.
        with FilmWriter(folder / f"{kind}.mp4") if rank == 0 else nullcontext() as film:
            state = [film.state if rank == 0 else None]
            dist.broadcast_object_list(state)
            settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
            made = stream(pipe, START, kind, state=state[0], **settings)
            for clip in islice(made, clips):
                if rank == 0:
                    film.append(clip)
    told[kind] = {"tokens": sorted(tokens), "clip": clip.frames.tobytes().hex()}

pipe = make_pipe("ti2v-5b")
share(pipe.transformer)
try:
    stream(pipe, START, "ti2v-5b", guidance_scale=1.0)
except ValueError as error:
    told["refused"] = str(error)
(folder / f"{rank}.json").write_text(json.dumps(told))
dist.destroy_process_group()
if second:
    assert os.waitpid(second, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the two leave behind."""
    folder = tmp_path_factory.mktemp("parallel")
    done = subprocess.run([sys.executable, "-c", WORKER, str(folder)], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def told(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_same_film_each_with_half_of_the_tokens(kind, folder):
    first, second = told(folder)
    assert first[kind] == second[kind] and first[kind]["tokens"] == [6]


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_them_writes_the_film_that_one_process_makes(kind, folder, tmp_path):
    """To the byte, though the two stopped after the first clip and went on."""
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
    with FilmWriter(tmp_path / "film.mp4") as film:
        for clip in islice(stream(make_pipe(kind), START, kind, **settings), 3):
            film.append(clip)
    assert (folder / f"{kind}.mp4").read_bytes() == (tmp_path / "film.mp4").read_bytes()


def test_a_film_that_they_cannot_share_is_refused(folder):
    for refused in told(folder):
        assert "3 tokens a clip, for 2 heads" in refused["refused"]
        assert "2 processes cannot share them evenly" in refused["refused"]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("wan2.1-i2v-14b-480p", 32760),
        ("wan2.1-i2v-14b-720p", 75600),
        ("wan2.2-i2v-a14b", 32760),
        ("wan2.2-ti2v-5b", 27280),
    ],
)
def test_2_4_or_8_processes_can_share_a_clip_of_a_published_model(model, tokens):
    """16 cannot: heads of attention, 40 or 24, are shared too."""
    shapes = model_shapes(model)
    assert shapes.num_tokens(*shapes.size) == tokens
    heads = shapes.transformer["num_attention_heads"]
    assert [count for count in (2, 4, 8, 16) if not (tokens % count or heads % count)] == [2, 4, 8]
