"""Train the transformer and the text encoder of svi-tiny from scratch, as Wan image-to-video models are trained.

    PYTHONPATH=examples python -m svi_tiny.train_transformer --output_dir outputs/svi-tiny

Clean conditions only: the first frame of a clip, followed by grey frames, through the VAE; the prompt; the mask. The
result is a complete pipeline folder for `SVIPipeline.from_pretrained`. Nothing here knows of chains or errors: that
the model drifts when it is chained is the point.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffusers_svi import PixelMotion, SVIPipeline
from diffusers_svi.conditioning import Carried
from diffusers_svi.flow import interpolate, shift_sigma, velocity
from diffusers_svi.wan import encode_video, num_latent_frames, transformer_inputs

from . import world
from .sizes import HEAD_DIM, SIZES, Size
from .training import (
    HELD_OUT,
    Checkpoints,
    Deadline,
    Record,
    add_shared_options,
    clip_batches,
    cosine_schedule,
    matrix_optimizer,
    sample_clips,
    stop_unfinished,
    training_steps,
)


FLOW_SHIFT = 5.0
PROMPT_TOKENS = 32  # the longest prompt of the world has 25


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Model folder, with the trained `vae` in it.")
    parser.add_argument("--cache_dir", type=Path, default=Path("outputs/svi-tiny-latents"), help="Encoded clips.")
    parser.add_argument("--checkpoint_dir", type=Path, default=Path("outputs/svi-tiny"), help="For interrupted runs.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_clips", type=int, default=16384, help="Clips to train on.")
    parser.add_argument("--max_train_steps", type=int, default=7500)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="Of the matrices in the blocks; all else has half of it."
    )
    parser.add_argument(
        "--two_sided_share",
        type=float,
        default=0.4,
        help="Share of clips whose prompt names both left and right: few in the world, and the hardest to understand.",
    )
    parser.add_argument("--prompt_dropout", type=float, default=0.1, help="Share of clips trained without a prompt.")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    add_shared_options(parser)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--validation_steps", type=int, default=500)
    parser.add_argument("--num_validation_clips", type=int, default=12)
    return parser.parse_args()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: the words of the world's captions, read off a sample in which each occurs many times."""
    words = set()
    for index in range(20000):
        state, (action,) = world.sample_story(0, index)
        words.update(world.caption(state, action).replace(",", " ,").split())
    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(words)]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    text_encoder = UMT5EncoderModel(config)
    look_back(text_encoder)
    return text_encoder


@torch.no_grad()
def look_back(text_encoder: UMT5EncoderModel) -> None:
    """Let three heads of every layer begin by looking one, two, and three words back.

    With the usual start all heads take the mean over the prompt, and the order of words goes unnoticed for thousands
    of steps: "moves left, the camera pans right" is the same as "moves right, the camera pans left".
    """
    for block in text_encoder.encoder.block:
        attention = block.layer[0].SelfAttention
        bias = attention.relative_attention_bias.weight  # (buckets, heads); bucket n is n words back
        bias[:, :3] = 0
        bias[1, 0] = bias[2, 1] = bias[3, 2] = 4


def build_transformer(z_dim: int, size: Size = SIZES["tiny"]) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=size.num_heads,
        attention_head_dim=HEAD_DIM,
        in_channels=z_dim + 4 + z_dim,
        out_channels=z_dim,
        text_dim=128,
        freq_dim=128,
        ffn_dim=size.ffn_dim,
        num_layers=size.num_layers,
        rope_max_seq_len=64,
    )


def encode_clips(args, vae: AutoencoderKLWan, tokenizer, deadline: Deadline) -> dict[str, np.ndarray]:
    """Latents, condition latents and tokens of the training clips, in files; an interrupted run goes on."""
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    shape = (vae.config.z_dim, num_latent_frames(world.CLIP_FRAMES), world.SIZE // 8, world.SIZE // 8)
    layout = {
        "latents": (shape, np.float16),
        "conditions": (shape, np.float16),
        "tokens": ((PROMPT_TOKENS,), np.int64),
    }
    files = {name: args.cache_dir / f"{name}.npy" for name in layout}
    exists = all(file.exists() for file in files.values())
    arrays = {
        name: np.lib.format.open_memmap(files[name], "r+" if exists else "w+", dtype, (args.num_clips, *size))
        for name, (size, dtype) in layout.items()
    }
    done_file = args.cache_dir / "clips_done"
    done = int(done_file.read_text()) if exists and done_file.exists() else 0
    numbers = [
        range(first, min(first + args.train_batch_size, args.num_clips))
        for first in range(done, args.num_clips, args.train_batch_size)
    ]
    batches = clip_batches(args.seed, numbers, vae.device, args.dataloader_num_workers)
    for clips, (prompts, pixels) in zip(tqdm(numbers, desc="Encoding clips"), batches, strict=True):
        rows = slice(clips.start, clips.stop)
        with torch.no_grad():
            arrays["latents"][rows] = encode_video(vae, pixels).cpu().half()
            condition = PixelMotion().condition(
                vae, Carried(pixels[:, :, 0]), world.CLIP_FRAMES, expand_timesteps=False
            )
            arrays["conditions"][rows] = condition.cpu().half()
        arrays["tokens"][rows] = tokenizer(prompts, padding="max_length", max_length=PROMPT_TOKENS).input_ids
        done_file.write_text(str(rows.stop))
        if deadline.over() and rows.stop < args.num_clips:
            stop_unfinished(rows.stop, args.num_clips, "clips encoded")
    return arrays


def embed_prompts(text_encoder: UMT5EncoderModel, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """As `WanImageToVideoPipeline.encode_prompt`: zeros behind the last token, up to `length`."""
    mask = tokens.ne(0)
    embeds = text_encoder(tokens, mask).last_hidden_state * mask.unsqueeze(-1)
    return torch.nn.functional.pad(embeds, (0, 0, 0, length - tokens.shape[1]))


def validation_error(pipe: SVIPipeline, seed: int, num_clips: int) -> dict[str, torch.Tensor]:
    """Root mean square error of sampled latents of held-out clips, in units of the latents' standard deviation."""
    errors = []
    for index in range(num_clips):
        prompts, pixels = sample_clips(seed, [HELD_OUT + index])
        size = {"height": world.SIZE, "width": world.SIZE, "num_frames": world.CLIP_FRAMES}
        latents = pipe(
            image=pixels[:, :, 0] / 2 + 0.5,
            prompts=prompts,
            num_inference_steps=10,
            guidance_scale=1.0,
            max_sequence_length=PROMPT_TOKENS,
            seeds=[index],
            output_type="latent",
            **size,
        ).frames[0]
        with torch.no_grad():
            truth = encode_video(pipe.vae, pixels.to(pipe.device)).cpu()
        errors.append((latents.cpu() - truth).square().mean(dim=(0, 1, 3, 4)))
    rms = torch.stack(errors).mean(dim=0).sqrt()
    return {"latent_rms": rms.mean(), "last_latent_rms": rms[-1]}


def main():
    args = parse_args()
    deadline = Deadline(args.max_minutes)
    set_seed(args.seed)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    vae = AutoencoderKLWan.from_pretrained(args.output_dir / "vae").to(device).requires_grad_(False)
    tokenizer = build_tokenizer()
    arrays = encode_clips(args, vae, tokenizer, deadline)

    text_encoder = build_text_encoder(len(tokenizer))
    transformer = build_transformer(vae.config.z_dim, SIZES[args.size])
    text_encoder, transformer = text_encoder.to(device), transformer.to(device).train()
    accelerator.print(f"{sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M parameters")
    models = {"text_encoder": text_encoder, "transformer": transformer}
    checkpoints = Checkpoints(args.checkpoint_dir, models, args.weights_only)
    first_step = checkpoints.load_weights()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = set(map(id, matrices))
    others = [p for p in (*transformer.parameters(), *text_encoder.parameters()) if id(p) not in chosen]
    optimizers = [
        matrix_optimizer(args, matrices, weight_decay=0.01),
        torch.optim.AdamW(others, lr=args.learning_rate / 2, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [cosine_schedule(optimizer, 200, args.max_train_steps, first_step) for optimizer in optimizers]
    text_encoder, transformer, *prepared = accelerator.prepare(text_encoder, transformer, *optimizers, *schedules)
    optimizers, schedules = prepared[:2], prepared[2:]
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=args.ema_decay)
    if not args.weights_only:
        first_step = checkpoints.load_everything(accelerator, ema)
    ema.to(device)
    if device.type == "cpu":
        # At 320 tokens, and kept in bfloat16, twice as fast as PyTorch's fused kernel for CPUs.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        accelerator.unwrap_model(transformer).set_attention_backend("_native_math")

    pipe = SVIPipeline(
        tokenizer=tokenizer,
        text_encoder=accelerator.unwrap_model(text_encoder),
        vae=vae,
        scheduler=scheduler,
        transformer=accelerator.unwrap_model(transformer),
    )
    pipe.set_progress_bar_config(disable=True)
    record = Record(args.output_dir / "training" / "transformer.json", args.seed)
    progress = training_steps(accelerator, first_step, args.max_train_steps, "Wan")
    patch_size = pipe.transformer.config.patch_size
    running_loss = None
    left, right = tokenizer.convert_tokens_to_ids(["left", "right"])
    two_sided = (arrays["tokens"] == left).any(axis=1) & (arrays["tokens"] == right).any(axis=1)
    probabilities = np.where(
        two_sided,
        args.two_sided_share / max(two_sided.sum(), 1),
        (1 - args.two_sided_share) / max((~two_sided).sum(), 1),
    )
    probabilities /= probabilities.sum()
    for step in progress:
        rng = np.random.default_rng([args.seed, step])
        rows = np.sort(rng.choice(args.num_clips, size=args.train_batch_size, p=probabilities))
        latents, conditions = (
            torch.from_numpy(arrays[name][rows]).to(device).float() for name in ("latents", "conditions")
        )
        tokens = torch.from_numpy(arrays["tokens"][rows]).to(device)
        dropped = torch.from_numpy(rng.random(len(rows)) < args.prompt_dropout).to(device)
        tokens[dropped] = torch.tensor([tokenizer.eos_token_id] + [0] * (PROMPT_TOKENS - 1), device=device)
        u = torch.from_numpy(rng.random(len(rows), dtype=np.float32)).to(device)
        sigmas = shift_sigma(u, FLOW_SHIFT)
        generator = torch.Generator(device).manual_seed(args.seed + step)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        noisy = interpolate(latents, noise, sigmas)
        # The pipeline pads prompts to 512 tokens unless told otherwise; now and then training does too.
        length = 512 if step % 8 == 0 else PROMPT_TOKENS
        with accelerator.autocast():
            prediction = transformer(
                *transformer_inputs(noisy, conditions, sigmas, patch_size, expand_timesteps=False),
                embed_prompts(text_encoder, tokens, length),
                return_dict=False,
            )[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), velocity(latents, noise))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(parameters)

        running_loss = loss.detach() if running_loss is None else torch.lerp(running_loss, loss.detach(), 0.02)
        if (step + 1) % args.validation_steps == 0 or step + 1 == args.max_train_steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            figures = {"loss": running_loss, **validation_error(pipe, args.seed, args.num_validation_clips)}
            ema.restore(parameters)
            record.add(step + 1, progress, **figures)
        over = deadline.over() and step + 1 < args.max_train_steps
        if over or (step + 1) % args.checkpointing_steps == 0:
            checkpoints.save(accelerator, step + 1, ema)
        if over:
            record.write()
            stop_unfinished(step + 1, args.max_train_steps, "steps of the transformer")

    ema.copy_to(parameters)
    # Half the bytes; loading turns them into float32 again. What Wan keeps in float32 stays so.
    for name, parameter in pipe.transformer.named_parameters():
        if not any(module in name for module in pipe.transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.bfloat16()
    vae.half()
    pipe.save_pretrained(args.output_dir)
    record.write(parameters=sum(p.numel() for p in transformer.parameters()))
    accelerator.print(f"Saved {args.output_dir}.")


if __name__ == "__main__":
    main()
