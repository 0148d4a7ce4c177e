r"""How the models of the world of vectors are trained: plainly, by error recycling, and with one thing changed.

Mask, schedule, loss weights, injection and bank are the library's own; `CONTESTANTS` tells what differs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from vectors import CHANNELS, FRAMES, TEXT_DIM, World

from diffusers_svi.erft import (
    BankConfig,
    ErrorBank,
    ErrorRecycler,
    InjectionConfig,
    RecyclerConfig,
    erft_loss,
    loss_weights,
    recycled_velocity,
    restoration_weights,
    restorative_velocity,
    self_error,
)
from diffusers_svi.erft.bank import StoredError
from diffusers_svi.erft.injection import Switches
from diffusers_svi.flow import interpolate, like, shifted_sigmas
from diffusers_svi.wan import transformer_inputs


SHIFT = 3.0
TIMESTEPS = 1000
PUBLISHED = {"p_vid": 0.9, "p_noi": 0.01, "p_img": 0.9, "p_clean": 0.2, "n_img": 1}
# Every fourth step hands so many errors to the bank. All of them would take longer than the training itself.
BANKED, BANKED_EVERY = 16, 4
# source: EverAnimate. The noise levels from which on, and how often, its target leads back from a flawed sample.
RESTORED_FROM, RESTORED_SHARE = 0.5, 0.8


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """How a base is trained on.

    Args:
        injection (`dict`, *optional*): Arguments of `InjectionConfig`; without them nothing is injected.
        bank (`dict`): Arguments of `BankConfig` that differ from its defaults.
        white (`bool`): Whether noise of the size of the errors takes their place.
        restorative (`bool`): Whether the model learns to lead its own one-step prediction back to the clean latents.
        share (`float`): Of the steps of the others.
        learning_rate (`float`): Of the one cycle, at its highest.
    """

    injection: dict[str, Any] | None = None
    bank: dict[str, Any] = field(default_factory=dict)
    white: bool = False
    restorative: bool = False
    share: float = 1.0
    learning_rate: float = 1e-3


BASE = Contestant(learning_rate=2e-3)
CONTESTANTS = {
    "control": Contestant(),
    "published": Contestant(injection=PUBLISHED),
    "E_img alone": Contestant(injection={**PUBLISHED, "p_vid": 0.0, "p_noi": 0.0}),
    "E_vid alone": Contestant(injection={**PUBLISHED, "p_img": 0.0, "p_noi": 0.0}),
    "E_noi alone": Contestant(injection={**PUBLISHED, "p_img": 0.0, "p_vid": 0.0, "p_noi": 0.9}),
    "white noise": Contestant(injection=PUBLISHED, white=True),
    "restorative": Contestant(restorative=True),
    "bank of 8": Contestant(injection=PUBLISHED, bank={"capacity": 8}),
    "random replacement": Contestant(injection=PUBLISHED, bank={"replacement": "random"}),
    "fifo replacement": Contestant(injection=PUBLISHED, bank={"replacement": "fifo"}),
    "p_clean 0": Contestant(injection={**PUBLISHED, "p_clean": 0.0}),
    "p_clean 0.5": Contestant(injection={**PUBLISHED, "p_clean": 0.5}),
    "40% of the steps": Contestant(injection=PUBLISHED, share=0.4, learning_rate=5e-4),
}


class WhiteBank(ErrorBank):
    """A bank that hands out white noise, in every latent frame of the size of its error."""

    def get(self, grid: int, place: int) -> StoredError:
        stored = super().get(grid, place)
        size = stored.residual.square().mean(dim=0, keepdim=True).sqrt()
        return StoredError(torch.randn(stored.residual.shape, generator=self.noise) * size, stored.sigma)


def make_model() -> WanTransformer3DModel:
    """A transformer of Wan's form, 0.3 million parameters, the same at every call."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=2 * CHANNELS + 4,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=128,
        num_layers=4,
        rope_max_seq_len=32,
    )


def predict(
    model: WanTransformer3DModel,
    noisy: torch.Tensor,
    condition: torch.Tensor,
    sigmas: torch.Tensor,
    texts: torch.Tensor,
) -> torch.Tensor:
    """The velocity, of the shape of `noisy`: `(n, CHANNELS, FRAMES, 1, 1)`."""
    hidden_states, timesteps = transformer_inputs(noisy, condition, sigmas, (1, 1, 1), False)
    return model(hidden_states=hidden_states, timestep=timesteps, encoder_hidden_states=texts, return_dict=False)[0]


def condition_on(frames: torch.Tensor) -> torch.Tensor:
    """The condition of clips that begin with frames `(n, CHANNELS)`: `y = [frame, zeros]`."""
    return torch.nn.functional.pad(frames[:, :, None, None, None], (0, 0, 0, 0, 0, FRAMES - 1))


def make_recycler(contestant: Contestant, seed: int) -> ErrorRecycler:
    kind = WhiteBank if contestant.white else ErrorBank
    config = BankConfig(dtype="float32", **contestant.bank)
    bank = kind((CHANNELS, FRAMES, 1, 1), shifted_sigmas(config.num_grids, SHIFT), config)
    if isinstance(bank, WhiteBank):
        bank.noise = torch.Generator().manual_seed(seed)
    assert contestant.injection is not None
    return ErrorRecycler(bank, InjectionConfig(**contestant.injection), RecyclerConfig(), seed)


def train(
    model: WanTransformer3DModel,
    world: World,
    contestant: Contestant,
    steps: int,
    batch_size: int,
    seed: int,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """Train `model`, all of its weights; `look` is called before every step."""
    # The fused AdamW alone saves a fifth of the step on a CPU.
    optimizer = torch.optim.AdamW(model.parameters(), lr=contestant.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, contestant.learning_rate, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    all_sigmas = shifted_sigmas(TIMESTEPS, SHIFT).float()
    weights, alphas = loss_weights(TIMESTEPS, SHIFT).float(), restoration_weights(TIMESTEPS, SHIFT).float()
    recycler = make_recycler(contestant, seed) if contestant.injection is not None else None
    for step in range(steps):
        look(step)
        clips = world.clips(batch_size, generator)
        clean, texts = clips.latents, world.texts[clips.prompts]
        condition = condition_on(clean[:, :, 0, 0, 0])
        noise = torch.randn(clean.shape, generator=generator)
        places = torch.randint(TIMESTEPS, (batch_size,), generator=generator)
        sigmas, latents = all_sigmas[places], clean
        if recycler is not None:
            latents, noise, condition, switches = recycler.inject(clean, noise, condition, sigmas)
        noisy, target = interpolate(latents, noise, sigmas), recycled_velocity(clean, noise)
        if contestant.restorative:
            chosen = (sigmas >= RESTORED_FROM) & (torch.rand(batch_size, generator=generator) < RESTORED_SHARE)
            with torch.no_grad():
                predicted = predict(model, noisy, condition, sigmas, texts)
            flawed = clean + self_error(predicted, clean, noise, sigmas) * like(chosen, clean)
            noisy = interpolate(flawed, noise, sigmas)
            target = restorative_velocity(clean, flawed, noise, sigmas, alphas[places])
        prediction = predict(model, noisy, condition, sigmas, texts)
        loss = erft_loss(prediction, target, weights[places]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if recycler is not None and step % BANKED_EVERY == 0:
            few = Switches(*(switch[:BANKED] for switch in switches))
            recycler.recycle((prediction - target).detach()[:BANKED], sigmas[:BANKED], few)
