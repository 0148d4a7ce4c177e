"""Whatever is given, what comes is a result or a `ValueError` that names what is wrong with it; nothing else.

200 examples of every kind; `make fuzz` looks at 5,000.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from conftest import CLIP, load_script, make_components, quiet, seeded
from diffusers_svi import ChainState, ClipSpec, HeldLatents, LatentMotion, PixelMotion, SVIPipeline, load_prompts
from diffusers_svi.training.lists import read_captions


ROOT = Path(__file__).parents[1]

settings.register_profile(
    "ci",
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=5000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@contextlib.contextmanager
def refused(*names: str):
    """What is refused is refused with a message that has one of `names`, or any name, in backticks."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in names or ("`",)) and len(text) > 20, text


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes as they come out of a disk or a download."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        # The beginning of a file says the most.
        place = draw(st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1)))
        content[place] = draw(st.integers(0, 255))
    match draw(st.integers(0, 5)):
        case 0:
            return bytes(content[: draw(st.integers(0, len(content)))])
        case 1:
            return bytes(content) + draw(st.binary(max_size=20))
        case 2:
            start = draw(st.integers(0, len(content)))
            return bytes(content[:start]) + bytes(len(content) - start)
    return bytes(content)


# States


def make_state(scheme) -> ChainState:
    pixels = isinstance(scheme, PixelMotion)
    frames = torch.zeros(1, 3, scheme.carried_frames, 32, 32, dtype=torch.uint8) if pixels else None
    return ChainState(
        conditioning=scheme,
        num_frames=9,
        image=torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32),
        frames=frames,
        latents=None if pixels or not scheme.carried_latents else torch.randn(1, 16, 1, 4, 4, generator=seeded()),
        num_clips=2,
        generator=seeded().get_state(),
        made_with={"vae": "0"},
    )


@st.composite
def states(draw) -> bytes:
    schemes = PixelMotion(1), PixelMotion(5, "reference"), LatentMotion(1), LatentMotion(0), HeldLatents(1)
    state = make_state(draw(st.sampled_from(schemes)))
    tensors = {name: value for name, value in state._tensors().items() if value is not None}
    metadata = {
        "format": "diffusers_svi.chain",
        "conditioning": json.dumps(state.conditioning.to_dict()),
        "num_frames": "9",
        "num_clips": "2",
        "made_with": json.dumps(dict(state.made_with)),
    }
    if draw(st.booleans()):
        name = draw(st.sampled_from([*tensors, "frames", "latents", "other"]))
        shape = draw(st.lists(st.integers(0, 6), max_size=6))
        dtype = draw(st.sampled_from([torch.float32, torch.uint8, torch.float16, torch.int64, torch.bool]))
        value = draw(st.sampled_from([0.0, 1.0, -3.0, math.nan, math.inf]))
        tensors[name] = torch.full(shape, value if dtype.is_floating_point else 1, dtype=dtype)
    elif draw(st.booleans()):
        tensors.pop(draw(st.sampled_from([*tensors])))
    if draw(st.booleans()):
        key = draw(st.sampled_from([*metadata]))
        numbers = st.integers().map(str) | st.sampled_from(["1e3", "-1", "0x10", "9" * 5000, "[" * 10**5])
        metadata[key] = draw(numbers | anything.map(json.dumps) | st.text(max_size=20))
    content = save(tensors, metadata)
    return draw(damaged(content)) if draw(st.booleans()) else content


@given(content=states())
def test_states(content, tmp_path):
    (tmp_path / "state").write_bytes(content)
    with refused("`path`="):
        state = ChainState.load(tmp_path / "state")
        assert state.start >= 0
        state.save(tmp_path / "again")
        assert ChainState.load(tmp_path / "again").num_clips == state.num_clips


# LoRAs


@pytest.fixture(scope="module")
def pipe() -> SVIPipeline:
    return quiet(SVIPipeline(**make_components("a14b")))


LAYERS = {
    **{f"self_attn.{name}": (24, 24) for name in ("q", "k", "v", "o")},
    **{f"cross_attn.{name}": (24, 24) for name in ("q", "k_img", "norm_q")},
    "ffn.0": (32, 24),
    "ffn.2": (24, 32),
    "modulation": (24, 24),
}
PREFIXES = ["", "diffusion_model.", "pipe.dit.", "transformer.", "lora_unet_", "lora_unet__", "base_model.model."]
SIDES = [
    "lora_A.weight",
    "lora_A.default.weight",
    "lora_down.weight",
    "lora_up.weight",
    "lora_B.weight",
    "lora_B.bias",
]
ENDS = [*SIDES, "alpha", "diff", "diff_b", "diff_m", "hada_w1_a", "lokr_w1", "dora_scale", "lora_C.weight", ""]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.float64]


@st.composite
def loras(draw) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    prefix = draw(st.sampled_from(PREFIXES))
    down, up = draw(st.sampled_from([SIDES[::4], ["lora_down.weight", "lora_up.weight"]]))
    tensors = {}
    for layer in draw(st.lists(st.sampled_from([*LAYERS]), min_size=1, max_size=3, unique=True)):
        rank, (rows, columns) = draw(st.integers(1, 4)), LAYERS[layer]
        name = f"{prefix}blocks.{draw(st.integers(0, 2))}.{layer}"
        name = f"{prefix}{name.removeprefix(prefix).replace('.', '_')}" if prefix.startswith("lora_unet") else name
        tensors[f"{name}.{down}"] = torch.full((rank, columns), 0.1)
        tensors[f"{name}.{up}"] = torch.full((rows, rank), 0.1)
        if draw(st.booleans()):
            tensors[f"{name}.alpha"] = torch.tensor(draw(st.floats(width=32) | st.just(4.0)))
    for _ in range(draw(st.integers(0, 2))):
        key = draw(st.sampled_from([*tensors]))
        match draw(st.integers(0, 4)):
            case 0:
                tensors.pop(key)
                if not tensors:
                    break
            case 1:
                tensors[key] = tensors[key].to(draw(st.sampled_from(DTYPES)))
            case 2:
                tensors[key] = torch.full_like(tensors[key].float(), draw(st.sampled_from([math.nan, math.inf, 0.0])))
            case 3:
                shape = draw(st.lists(st.integers(0, 24), max_size=4))
                tensors[key] = torch.zeros(shape)
            case 4:
                stem = key.rsplit(".lora", 1)[0]
                end = draw(st.sampled_from(ENDS) | st.text(max_size=8))
                tensors[f"{stem}.{end}"] = tensors.pop(key)
    keys = st.sampled_from(["svi_conditioning", "svi_expert", "svi_clip_resize", "lora_adapter_metadata", "format"])
    texts = st.text(max_size=20) | anything.map(json.dumps) | st.sampled_from(["{", "[" * 10**4, '{"scheme": "Film"}'])
    return tensors, draw(st.none() | st.dictionaries(keys, texts, max_size=2))


@given(lora=loras(), as_file=st.booleans(), data=st.data())
def test_loras(lora, as_file, data, pipe, tmp_path):
    tensors, metadata = lora
    source = {name: value.clone() for name, value in tensors.items()}
    if as_file:
        source = tmp_path / "lora.safetensors"
        content = save(tensors, metadata) if tensors else save({}, metadata)
        source.write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    with refused("LoRA", "`"):
        try:
            pipe.load_lora_weights(source, adapter_name="fuzzed")
        except ValueError:
            assert "fuzzed" not in getattr(pipe.transformer, "peft_config", {})
            raise
        for name, parameter in pipe.transformer.named_parameters():
            assert "lora_" not in name or (parameter.device.type != "meta" and parameter.isfinite().all()), name
        pipe.unload_lora_weights()


# Prompt files


FRAGMENTS = st.sampled_from(
    [
        *(
            "prompts = [",
            "prompts  =[",
            "prompts=(",
            "]",
            '"a cat",',
            "'a dog'",
            "# scene 1",
            "a cat sits",
            "\n",
            "\r\n",
        ),
        *(
            "\r\n",
            "\u2028",
            "import os",
            "os.system('touch hacked')",
            "[",
            "{",
            '{"prompts": ["a"]}',
            "\\",
            '"""',
            ",",
            "\t",
        ),
        *(
            "|",
            ";;;",
            "0:",
            "1-2:",
            "-1:",
            "0-99999999:",
            "[/duration=5s]",
            "[/duration=",
            "20%",
            "[/loras_mult=1;3 ",
            "]",
        ),
        *(
            "[/new_shot,",
            "/overlap=9]",
            "[/x] a cat",
            "! {A}=",
            '{"prompt": "a"}',
            '{"prompt": ',
            '"seed": 1e99',
            "}\n",
        ),
        *('[{"text": "a"}, ', '{"start_window": 3, "end_window": 1e9}', '"cut": "a.png"', '"text": 1', "null", "NaN"),
        *("x = 1", "def f():", "f'{1}'", "\0", "a" * 300, "(" * 300, "ä", "一只猫", "None", "1", "lambda: 0", "\x0c"),
    ]
)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "gbk")


@given(
    parts=st.lists(FRAGMENTS | st.text(max_size=10), max_size=12),
    encoding=st.sampled_from(ENCODINGS),
    data=st.data(),
)
def test_prompt_files(parts, encoding, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = "".join(parts).encode(encoding, errors="replace")
    if content and data.draw(st.booleans()):
        content = data.draw(damaged(content))
    (tmp_path / "prompts.txt").write_bytes(content)
    options = data.draw(st.sampled_from([{}, {"num_clips": 4}, {"adapters": ["default_0"]}]))
    with refused("`path`="):
        prompts = load_prompts(tmp_path / "prompts.txt", **options)
        told = [prompt.prompt if isinstance(prompt, ClipSpec) else prompt for prompt in prompts]
        assert told and all(isinstance(prompt, str) and prompt.strip() for prompt in told)
    assert not (tmp_path / "hacked").exists()


clips = st.dictionaries(
    st.sampled_from(["prompt", "seed", "lora_weights", "cut", "num_clips", "guidance_scale", "text", "end_window"])
    | st.text(),
    st.just("a cat") | st.integers(0, 5) | anything,
    max_size=4,
)


@given(
    values=st.lists(clips | st.just("a cat"), max_size=4), form=st.sampled_from(["list", "lines", "segments", "name"])
)
def test_prompt_files_of_clips(values, form, tmp_path):
    text = {
        "list": json.dumps(values),
        "lines": "\n".join(map(json.dumps, values)),
        "segments": json.dumps({"prompt_segments": values}),
        "name": json.dumps({"prompts": values}),
    }[form]
    (tmp_path / "prompts.txt").write_text(text)
    with refused("`path`="):
        for clip in load_prompts(tmp_path / "prompts.txt"):
            assert (clip.prompt if isinstance(clip, ClipSpec) else clip).strip()


# Lists of videos


CELLS = st.sampled_from(
    [
        *(
            "file_name",
            "text",
            "Filename",
            "Video Description",
            "a.mp4",
            "b.mp4",
            "a cat",
            '"a cat, black"',
            '"big" cat',
        ),
        *(
            ",",
            ";",
            "\t",
            "\n",
            "\r\n",
            "\r",
            '"',
            "../out.mp4",
            "/etc/passwd",
            "",
            " ",
            "\0",
            "猫",
            "’",
            "{",
            '{"a": 1}',
        ),
        *('{"file_name": "a.mp4", "text": "a cat"}', "[1]", "null", '"a cat, black"', '"big" cat', "’", '{"a": 1}'),
    ]
)


@given(
    parts=st.lists(CELLS | st.text(max_size=6), max_size=24),
    header=st.sampled_from(["", "file_name,text\n", "Filename;Video Description\r\n", "file_name\ttext\n"]),
    encoding=st.sampled_from(ENCODINGS),
    suffix=st.sampled_from(["csv", "CSV", "jsonl"]),
    data=st.data(),
)
def test_lists_of_videos(parts, header, encoding, suffix, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    content = (header + "".join(parts)).encode(encoding, errors="replace")
    if content and data.draw(st.booleans()):
        content = data.draw(damaged(content))
    file = folder / f"list.{suffix}"
    file.write_bytes(content)
    with refused(file.name, str(folder)):
        captions = read_captions(folder)
        assert captions
        for path, caption in captions:
            assert path.resolve().is_relative_to(folder.resolve())
            assert caption is None or caption.strip()


# Arguments of a film


IMAGES = st.sampled_from(
    [
        *(PIL.Image.new(mode, (32, 32)) for mode in ("RGB", "L", "RGBA", "P", "I;16", "F", "CMYK", "1")),
        *(PIL.Image.new("RGB", size) for size in ((1, 1), (640, 32), (17, 200), (0, 0))),
        *(torch.rand(shape, generator=seeded()) for shape in ((3, 32, 32), (1, 3, 40, 50), (4, 32, 32), (3, 3), ())),
        *(np.zeros((32, 32, 3), dtype) for dtype in (np.uint8, np.float32, np.int64, np.complex64, object)),
        torch.zeros(3, 32, 32, dtype=torch.complex64),
        torch.full((3, 32, 32), math.nan),
    ]
)
ODD = st.sampled_from(
    [
        *(-1, 0, 1, 2, 3, 16, 32, 33, 48, 64, 512, 513, 2**70, 10**12, 1.5, 16.0, math.nan, math.inf, -math.inf, True),
        *(np.int64(16), np.float32(2.5), np.array(3), np.array([1, 2]), torch.tensor(2), torch.tensor([1.0, 2.0])),
        *("", "text", "16", b"bytes", (), [], [1, 2, 3], [2**70], [1.5], [None], {}, {"a": 1}, {1, 2}, object(), int),
        *(PixelMotion(1), PixelMotion(5), LatentMotion(1), HeldLatents(1), ClipSpec("a cat"), ClipSpec("")),
        *(ClipSpec(3), ClipSpec("a", seed=-1), ["a cat", ClipSpec("a dog")], ["a", ""], ["a", None], iter(["a"])),
        *(range(3), itertools.count(0, 42), seeded(), [seeded()], "np", "pt", "pil", "latent", "crop", "squash"),
        *(torch.zeros(1, 4, 16), torch.zeros(3, 4, 16), torch.zeros(4, 16), torch.full((1, 4, 16), math.nan)),
        *(torch.zeros(3, 16, 3, 4, 4), torch.zeros(1), np.zeros((3, 4, 16)), make_state(PixelMotion(1))),
        *(make_state(LatentMotion(1)), print, ["latents"], ["noise"], [3]),
    ]
)
NAMES = sorted(SVIPipeline.stream.__signature__.parameters.keys() - {"self", "image", "prompts"})


@pytest.fixture(scope="module")
def idle() -> SVIPipeline:
    """A pipeline whose models cannot be used."""
    pipe = quiet(SVIPipeline(**make_components("i2v")))
    pipe.transformer.forward = pipe.vae.encode = pipe.text_encoder.forward = None
    return pipe


@given(
    image=IMAGES | ODD | anything,
    prompts=ODD | anything | st.just("a cat"),
    options=st.dictionaries(st.sampled_from(NAMES), ODD | anything, max_size=3),
    odd_image=st.booleans(),
    odd_prompts=st.booleans(),
)
def test_arguments_of_a_film(image, prompts, options, odd_image, odd_prompts, idle):
    image = image if odd_image else PIL.Image.new("RGB", (32, 32))
    prompts = prompts if odd_prompts else ["a cat", "a dog"]
    with refused():
        clips = idle.stream(image=image, prompts=prompts, **{**CLIP, **options})
        assert iter(clips) is clips


# Arguments of a training run


@pytest.fixture(scope="module")
def script():
    return load_script(ROOT / "examples" / "train_erft.py")


@pytest.fixture(scope="module")
def options(script) -> list[str]:
    """Every option that its help tells of."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        script.parse_args(["--help"])
    return sorted(set(re.findall(r"(?<![\w-])--\w+", told.getvalue())) - {"--help"})


@given(data=st.data())
def test_arguments_of_a_training_run(data, script, options):
    names = data.draw(st.lists(st.sampled_from(options), max_size=4, unique=True))
    words = st.sampled_from(
        [
            "-1",
            "0",
            "1",
            "2",
            "17",
            "0.5",
            "1e30",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "text",
            "",
            "none",
            "all",
            "high",
            "pixel",
        ]
    )
    arguments = ["--pretrained_model_name_or_path", "model", "--output_dir", "out", "--train_data_dir", "videos"]
    for name in names:
        arguments += [name, *data.draw(st.lists(words, max_size=2))]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            parsed = script.parse_args(arguments)
        except SystemExit as exit:
            assert exit.code in (0, 1, 2)
            assert exit.code == 0 or "--" in told.getvalue() or "`" in told.getvalue(), told.getvalue()
            return
    for name, value in vars(parsed).items():
        assert not isinstance(value, float) or math.isfinite(value), name
