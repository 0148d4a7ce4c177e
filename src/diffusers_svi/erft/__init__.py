"""Error-Recycling Fine-Tuning: a model's own errors are banked, injected into its inputs, and trained away."""

from .bank import BankConfig, ErrorBank, StoredError
from .distributed import ShardedErrorBank
from .injection import InjectionConfig, Switches
from .objective import clean_side_error, erft_loss, loss_weights, noise_side_error, recycled_velocity
from .recycler import ErrorRecycler, Injected, RecyclerConfig
from .restoration import restoration_weights, restorative_velocity, self_error
from .snapshot import load_bank, save_bank


__all__ = [
    "BankConfig",
    "ErrorBank",
    "ErrorRecycler",
    "Injected",
    "InjectionConfig",
    "RecyclerConfig",
    "ShardedErrorBank",
    "StoredError",
    "Switches",
    "clean_side_error",
    "erft_loss",
    "load_bank",
    "loss_weights",
    "noise_side_error",
    "recycled_velocity",
    "restoration_weights",
    "restorative_velocity",
    "save_bank",
    "self_error",
]
