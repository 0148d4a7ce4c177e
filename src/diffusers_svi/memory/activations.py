r"""What is alive beside the weights while a model computes: formulas, in bytes, of shapes alone.

Units: N tokens of a clip, d channels of a token, f channels inside the feed-forward network, r the LoRA's rank, e
bytes of a value in the type computed in. Norms and residual sums of Wan's blocks are computed in float32 (4 bytes).

All of it is read off diffusers' own modules: a test runs them at the true shapes on tensors without memory, counts
what is alive at every operation, and compares.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


FLOAT = 4
# Frames that every causal convolution of the VAE keeps of what it was given before, and frames it works on at a time.
KEPT_FRAMES = 2
GROUP_FRAMES = 4
# source: the defaults of AutoencoderKLWan.enable_tiling, in pixels
TILE, TILE_STRIDE = 256, 192
# Bytes beside query, key, value and output that a way of computing attention takes, times N d e; `None`: all scores.
# Flash attention and its kin keep one float32 a token and head; sage makes 8-bit copies of query and key.
ATTENTION_COPIES: dict[str, float | None] = {"flash": 0.0, "sage": 1.0, "math": None}


@dataclass(frozen=True)
class Tokens:
    """What a transformer is run on.

    Args:
        count (`int`): N, tokens of the clip, times the batch.
        width (`int`): d, channels of a token.
        inner (`int`): f, channels inside the feed-forward network.
        heads (`int`): Of the attention.
        context (`int`): Tokens of text and image that it attends to.
        itemsize (`int`): e, bytes of a value.
        timesteps (`bool`): Whether every token has a timestep of its own (TI2V-5B).
    """

    count: int
    width: int
    inner: int
    heads: int
    context: int
    itemsize: int
    timesteps: bool = False

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states, N d e."""
        return self.count * self.width * self.itemsize

    @property
    def modulation(self) -> int:
        """Bytes of shifts, scales and gates for every token: 6 N d from the embedding in e, 6 N d in float32, and the
        embedding itself, N d e."""
        return self.count * self.width * (7 * self.itemsize + 6 * FLOAT) if self.timesteps else 0


def block_peak(tokens: Tokens, rank: int = 0, attention: str = "flash") -> int:
    r"""Bytes alive at the worst moment of a block without gradients.

    The largest of

    - rotary embedding: input, normed input, query, key, value and one result in e, and three halves in float32:
      `6 N d e + 6 N d`;
    - attention: the six of them, and what its backend copies, or with "math" all scores twice, `2 heads N^2 e`;
    - feed-forward: block input, hidden states, attention's output, normed input, and two of f channels, three with a
      LoRA: `4 N d e + 2 N f e` or `4 N d e + 3 N f e`;
    - its residual: those four and its output, and three in float32, `5 N d e + 12 N d`; computed in float32, no copies
      are made: `7 N d e`.

    The text's keys and values, and the tables of the rotary embedding, are beside them.
    """
    values, half = tokens.count * tokens.width, tokens.itemsize < FLOAT
    copies = ATTENTION_COPIES[attention]
    scores = 2 * tokens.heads * tokens.count**2 * tokens.itemsize if copies is None else round(copies * tokens.hidden)
    rotary = 6 * tokens.hidden + 6 * values
    attended = 6 * tokens.hidden + scores
    forward = 4 * tokens.hidden + (3 if rank else 2) * tokens.count * tokens.inner * tokens.itemsize
    residual = 5 * tokens.hidden + 3 * FLOAT * values if half else 7 * tokens.hidden
    return max(rotary, attended, forward, residual) + tokens.modulation + _beside(tokens)


def _beside(tokens: Tokens) -> int:
    """Text and image as the blocks attend to them, with keys and values; and cosines and sines, 128 channels each."""
    head = tokens.width // tokens.heads
    return 4 * tokens.context * tokens.width * tokens.itemsize + 2 * tokens.count * head * FLOAT


def saved_by_block(tokens: Tokens, rank: int, precision: str) -> int:
    r"""Bytes that a block with a LoRA keeps for its backward pass.

    In float32 `15 N d + 2 N f`: of each of the three norms its input and result (6 N d), queries and keys before and
    after their norms, values and outputs of two attentions (9 N d, the text's keys and values apart), and the
    feed-forward's values before and after the activation. In half precision norms keep float32 copies of their
    inputs: `21 N d + 2 N f`. Under autocast, with a LoRA in float32, every LoRA layer keeps a copy of its own too:
    `32 N d + 3 N f`. The LoRAs' inner values are 8 N r more. Where every token has a timestep, what modulates it is
    kept: 8 N d in float32, 16 N d in half precision.

    Args:
        tokens (`Tokens`): What it is run on.
        rank (`int`): Of the LoRA.
        precision (`str`): "float32"; "half", all in bfloat16, as DeepSpeed has it; or "autocast".
    """
    of_width, of_inner = {"float32": (15, 2), "half": (21, 2), "autocast": (32, 3)}[precision]
    if tokens.timesteps:
        of_width += 8 if precision == "float32" else 16
    values = tokens.count * (of_width * tokens.width + of_inner * tokens.inner + 8 * rank)
    return tokens.itemsize * (values + 4 * tokens.context * tokens.width)


def backward_work(tokens: Tokens, precision: str, checkpointing: bool) -> int:
    r"""Bytes alive beside what blocks have kept, at the worst moment of a training step.

    In float32 two gradients of f channels, `2 N f`. In half precision the float32 copies that residual sums make
    of gradients: `9 N d`, without checkpointing `8 N d`; under autocast `10 N d + N f` or `7 N d + N f`. Where every
    token has a timestep, its embedding, 7 N d.
    """
    of_width, of_inner = {
        ("float32", True): (0, 2),
        ("float32", False): (0, 2),
        ("half", True): (9, 0),
        ("half", False): (8, 0),
        ("autocast", True): (10, 1),
        ("autocast", False): (7, 1),
    }[precision, checkpointing]
    of_width += 7 if tokens.timesteps else 0
    return tokens.itemsize * tokens.count * (of_width * tokens.width + of_inner * tokens.inner) + _beside(tokens)


def training_peak(tokens: Tokens, num_layers: int, rank: int, precision: str, checkpointing: bool) -> int:
    """Bytes alive at the worst moment of a training step: with checkpointing the inputs of all blocks, `L N d e`, and
    what one of them keeps; without, what all of them keep; and [`backward_work`]."""
    saved = saved_by_block(tokens, rank, precision)
    kept = num_layers * tokens.hidden + saved if checkpointing else num_layers * saved
    return kept + backward_work(tokens, precision, checkpointing)


# The VAE


def encode_peak(vae: Mapping[str, Any], num_frames: int, height: int, width: int, tiling: bool = False) -> int:
    """Bytes alive at the worst moment of encoding, in float32: see [`decode_peak`]; all pixels are there too."""
    pixels = 3 * num_frames * height * width * FLOAT
    if vae.get("patch_size"):
        pixels *= 2  # once more, as patches
    if tiling:
        height, width = min(height, TILE), min(width, TILE)
    return pixels + _network_peak(vae, height, width, decoder=False)


def decode_peak(vae: Mapping[str, Any], num_frames: int, height: int, width: int, tiling: bool = False) -> int:
    r"""Bytes alive at the worst moment of decoding, in float32.

    A group of four frames is made at a time. Every convolution keeps the last two frames of its C input channels,
    `2 C` a pixel of its resolution. The worst moment is the padding in front of a convolution of a residual block:
    the block's input, the shortcut, the activation, and twice, joined and padded, six frames of the activation, and
    its last two. The frames that are ready lie beside it, twice while they are joined with the next four; with tiling
    those of all tiles, which overlap by a quarter, and at the end joined, once more.
    """
    video = 3 * num_frames * height * width * FLOAT
    if not tiling or max(height, width) <= TILE:
        # As they are joined, and as they are clamped.
        return _network_peak(vae, height, width, decoder=True) + 2 * video
    tiles = math.ceil(height / TILE_STRIDE) * math.ceil(width / TILE_STRIDE)
    made = min(tiles * 3 * num_frames * TILE**2 * FLOAT, 2 * video)
    return max(_network_peak(vae, min(height, TILE), min(width, TILE), decoder=True) + made, made + 2 * video)


@dataclass(frozen=True)
class _Block:
    """A residual block of the VAE: channels in and out, at a share of the pixels; what holds its stage's input."""

    inputs: int
    outputs: int
    share: float
    frames: int
    held: int


def _blocks(vae: Mapping[str, Any], decoder: bool) -> Iterator[_Block]:
    """The residual blocks between the first convolution and the last."""
    residual, multipliers = bool(vae["is_residual"]), list(vae["dim_mult"])
    base = (vae["decoder_base_dim"] or vae["base_dim"]) if decoder else vae["base_dim"]
    temporal = list(vae["temperal_downsample"])
    levels = len(multipliers)
    if decoder:
        channels = [base * multiplier for multiplier in [multipliers[-1], *reversed(multipliers)]]
        steps, frames = list(reversed(temporal)), GROUP_FRAMES // 2 ** sum(temporal)
    else:
        channels, steps, frames = [base * multiplier for multiplier in [1, *multipliers]], temporal, GROUP_FRAMES
    for level, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        share = 4.0 ** -((levels - 1 - level) if decoder else level)
        if decoder and level and not residual:
            inputs //= 2
        # Stages of Wan 2.2's VAE keep a copy of their input for the shortcut around them.
        held = inputs * ((2 if residual else 1) if decoder else (1 if residual else 0))
        for _ in range(vae["num_res_blocks"] + (1 if decoder else 0)):
            yield _Block(inputs, outputs, share, frames, held)
            inputs = outputs
        if level < levels - 1 and steps[level]:
            frames = frames * 2 if decoder else max(1, frames // 2)


def _network_peak(vae: Mapping[str, Any], height: int, width: int, decoder: bool) -> int:
    patch = vae.get("patch_size") or 1
    pixels = (height // patch) * (width // patch) * FLOAT
    blocks = list(_blocks(vae, decoder))
    ends = vae["out_channels"] if decoder else vae["in_channels"]
    # Of the two convolutions of every block, and of the one at full resolution.
    last = blocks[-1].outputs if decoder else ends
    kept = KEPT_FRAMES * (last + sum((block.inputs + block.outputs) * block.share for block in blocks))
    work = max(
        block.share
        * (
            block.frames * (block.held + block.outputs + channels)
            + 2 * (block.frames + KEPT_FRAMES) * channels
            + KEPT_FRAMES * channels
        )
        for block in blocks
        for channels in (block.inputs, block.outputs)
    )
    return round(pixels * (kept + work))


# The encoders


def text_peak(text_encoder: Mapping[str, Any], tokens: int, itemsize: int) -> int:
    """Bytes alive in a block of the text encoder: positions' bias, scores and their softmax in float32, of all heads;
    hidden states, and three of the gated feed-forward."""
    scores = text_encoder["num_heads"] * tokens**2 * (2 * FLOAT + itemsize)
    return int(scores + tokens * itemsize * (6 * text_encoder["d_model"] + 3 * text_encoder["d_ff"]))


def image_peak(image_encoder: Mapping[str, Any], itemsize: int) -> int:
    """Bytes alive in the image encoder: the hidden states of all layers, which it returns, and those of a block."""
    tokens = (image_encoder["image_size"] // image_encoder["patch_size"]) ** 2 + 1
    layers, width = image_encoder["num_hidden_layers"], image_encoder["hidden_size"]
    return int(tokens * itemsize * ((layers + 9) * width + 2 * image_encoder["intermediate_size"]))
