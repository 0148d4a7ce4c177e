"""How large svi-tiny is made: the embedded model, a larger one for a card, and a tenth of that to try the way."""

from dataclasses import dataclass


HEAD_DIM = 64


@dataclass(frozen=True)
class Size:
    """Dimensions of a VAE and a transformer; all else of their architecture is the same at every size.

    Args:
        vae_dim (`int`): Channels of the VAE's first level; the two below have twice as many.
        num_layers (`int`): Blocks of the transformer.
        num_heads (`int`): Attention heads of a block, each of 64 channels.
        ffn_dim (`int`): Width within its feed-forward part.
    """

    vae_dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int


SIZES = {
    "tiny": Size(vae_dim=32, num_layers=6, num_heads=4, ffn_dim=768),
    # 8.4 and 13.8 million parameters: the most that two bytes for each leave under 60 MB, beside LoRAs and chains.
    "card": Size(vae_dim=56, num_layers=6, num_heads=6, ffn_dim=1152),
    "tenth": Size(vae_dim=16, num_layers=5, num_heads=2, ffn_dim=384),
}
