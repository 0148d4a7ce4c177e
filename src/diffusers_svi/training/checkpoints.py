"""`Checkpoints`: all that a training run needs to go on, bit for bit as if it had never been stopped."""

import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file

from ..erft import ErrorRecycler, load_bank, save_bank
from ..erft.snapshot import BankWriter


logger = get_logger(__name__)

UNFINISHED = ".unfinished"


class Checkpoints:
    """The folders `checkpoint-<step>` of a run; each has its name only when all that belongs into it is there.

    Beside what `Accelerator.save_state` writes, a checkpoint has bank and generators of every process. All methods
    are to be called by all processes.

    Args:
        folder: Where they are; unfinished ones of earlier runs are removed.
        accelerator (`Accelerator`): With everything prepared and hooks registered.
        recycler (`ErrorRecycler`): Of this process.
        generator (`torch.Generator`): Of noise and timesteps, of this process.
        total_limit (`int`, *optional*): Older checkpoints are removed when there are more.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        accelerator: Accelerator,
        recycler: ErrorRecycler,
        generator: torch.Generator,
        total_limit: int | None = None,
    ):
        self.folder, self.total_limit = Path(folder), total_limit
        self.accelerator, self.recycler, self.generator = accelerator, recycler, generator
        self._unfinished: Path | None = None
        self._writer: BankWriter | None = None
        if accelerator.is_main_process:
            for leftover in self.folder.glob(f"checkpoint-*{UNFINISHED}"):
                shutil.rmtree(leftover)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """The finished checkpoints, by step."""
        found = {path: _step(path) for path in self.folder.glob("checkpoint-*")}
        return [path for _, path in sorted((step, path) for path, step in found.items() if step is not None)]

    def save(self, step: int) -> None:
        """Write everything but the bank now, and begin to write the bank; training may go on."""
        self.finish()
        self._unfinished = self.folder / f"checkpoint-{step}{UNFINISHED}"
        options = {"exclude_frozen_parameters": True} if self.accelerator.state.deepspeed_plugin else {}
        self.accelerator.save_state(str(self._unfinished), **options)
        rank = self.accelerator.process_index
        state = {**self.recycler.state_dict(), "noise_generator": self.generator.get_state()}
        save_file(state, self._unfinished / f"recycler-{rank}.safetensors")
        self._writer = save_bank(self.recycler.bank, self._unfinished / f"bank-{rank}.safetensors")

    def poll(self) -> None:
        """Give the checkpoint its name if every process has written its bank. Does not wait."""
        if self._unfinished is None or not self.accelerator.is_main_process:
            return
        ranks = range(self.accelerator.num_processes)
        if not all((self._unfinished / f"bank-{rank}.safetensors").exists() for rank in ranks):
            return
        self._unfinished.rename(self._unfinished.with_name(self._unfinished.name.removesuffix(UNFINISHED)))
        self._unfinished = None
        for path in self.all()[: -self.total_limit] if self.total_limit else []:
            shutil.rmtree(path)

    def finish(self) -> None:
        """Wait until the checkpoint has its name. Raises what went wrong in writing the bank."""
        if self._writer is not None:
            self._writer.wait()
        self._writer = None
        self.accelerator.wait_for_everyone()
        self.poll()
        self.accelerator.wait_for_everyone()
        self._unfinished = None

    def resume(self, resume_from_checkpoint: str) -> int:
        """Load a checkpoint and return its step: 0 for "latest" where there is none yet.

        Args:
            resume_from_checkpoint (`str`): "latest", the name of a checkpoint in the folder, or the path of one.

        Raises:
            ValueError: if it is no checkpoint, or was written by another number of processes or with another bank.
        """
        name = resume_from_checkpoint
        if name == "latest":
            if not self.all():
                logger.info(f"No checkpoint in {self.folder} yet: this is a new run.")
                return 0
            path = self.all()[-1]
        else:
            path = Path(name) if Path(name).is_dir() else self.folder / name
        step = _step(path)
        if not path.is_dir() or step is None:
            known = [checkpoint.name for checkpoint in self.all()]
            raise ValueError(f"`resume_from_checkpoint`={name!r} is no checkpoint. There are: {known}.")
        rank = self.accelerator.process_index
        file = path / f"recycler-{rank}.safetensors"
        if not file.exists():
            raise ValueError(f"{path} was written by fewer processes than the {self.accelerator.num_processes} now.")
        # DeepSpeed's part has no frozen weights: they are those of the base.
        options = {"load_module_strict": False} if self.accelerator.state.deepspeed_plugin else {}
        self.accelerator.load_state(str(path), **options)
        state = load_file(file)
        self.generator.set_state(state.pop("noise_generator"))
        self.recycler.load_state_dict(state)
        load_bank(self.recycler.bank, path / f"bank-{rank}.safetensors")
        logger.info(f"Going on from {path}.")
        return step


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.resolve().name)
    return int(match.group(1)) if match else None
