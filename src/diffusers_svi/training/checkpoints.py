"""`Checkpoints`: all that a training run needs to go on, bit for bit as if it had never been stopped."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..checks import check_count
from ..erft import ErrorBank, ErrorRecycler, load_bank, save_bank
from ..erft.bank import shape_name
from ..erft.snapshot import BankWriter
from ..files import UNFINISHED
from .manifest import DamagedError, Manifest, check_checkpoint, read_manifest, write_manifest


logger = get_logger(__name__)

# Folders of any other name are the user's own.
NAME = re.compile("checkpoint-(0|[1-9][0-9]*)")


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The folders named exactly `checkpoint-<step>`, by step; whether they are whole, [`find_checkpoint`] says."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and not path.is_symlink()]
    return sorted((path for path in found if NAME.fullmatch(path.name)), key=_step)


def find_checkpoint(
    folder: str | os.PathLike, resume_from_checkpoint: str | None, num_processes: int = 1
) -> tuple[Path, Manifest] | None:
    """The checkpoint that a run in `folder` goes on from, and what it says of itself; `None` if it is a new run.

    Args:
        folder: Where the run keeps its own checkpoints.
        resume_from_checkpoint (`str`, *optional*):
            "latest", the name of a checkpoint in the folder, or the path of one. "latest" is `None` where there is
            none yet.
        num_processes (`int`, defaults to 1): Of this run.

    Raises:
        ValueError: if it is no checkpoint, is damaged, or was written by another number of processes; or if the
            folder has checkpoints that this run would not go on from.
    """
    folder, name = Path(folder), resume_from_checkpoint
    known = list_checkpoints(folder)
    if name is None or (name == "latest" and not known):
        if known:
            raise ValueError(
                f"{folder} has checkpoints of an earlier run, {_names(known)}: go on with it by "
                "`--resume_from_checkpoint latest`, give another `--output_dir`, or take them away."
            )
        return None
    path = known[-1] if name == "latest" else folder / name if (folder / name).is_dir() else Path(name)
    # A path may end in "." or be a link.
    path = path.resolve()
    if not path.is_dir() or not NAME.fullmatch(path.name):
        raise ValueError(
            f"`resume_from_checkpoint`={name!r} is no checkpoint. There are: "
            f"{[checkpoint.name for checkpoint in known]}. A checkpoint is a folder named `checkpoint-<step>`."
        )
    if path.parent != folder.resolve() and known:
        raise ValueError(
            f"`resume_from_checkpoint`={name!r} lies elsewhere, but {folder} has checkpoints of its own, "
            f"{_names(known)}: go on with them by `--resume_from_checkpoint latest`, or give another `--output_dir`."
        )
    try:
        # The bank is compared while it is loaded: it may be of 100 GB.
        manifest = check_checkpoint(path, banks=False)
        if manifest.step != _step(path):
            raise DamagedError(f"{path} was written as checkpoint-{manifest.step}: give it its name again.")
    except DamagedError as error:
        raise ValueError(f"{error} {_newest_good(path.parent, path)}") from error
    if manifest.num_processes != num_processes:
        raise ValueError(
            f"{path} was written by {manifest.num_processes} processes, but there are {num_processes} now: launch as "
            "many."
        )
    return path, manifest


class Checkpoints:
    """The folders `checkpoint-<step>` of a run; each has its name only when all that belongs into it is there.

    Beside what `Accelerator.save_state` writes, a checkpoint has banks and generators of every process, and a manifest
    with sizes and hashes. All methods are to be called by all processes.

    Args:
        folder: Where they are; unfinished ones of earlier runs are removed.
        accelerator (`Accelerator`): With everything prepared and hooks registered.
        recycler (`ErrorRecycler`): Of this process.
        generator (`torch.Generator`): Of noise and timesteps, of this process.
        total_limit (`int`, *optional*):
            Older checkpoints are removed when there are more; one that is whole is always kept.
        run (`dict[str, Any]`, *optional*): What every checkpoint is to say of the run, anything that JSON can hold.

    Raises:
        ValueError: if `total_limit` is below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        accelerator: Accelerator,
        recycler: ErrorRecycler,
        generator: torch.Generator,
        total_limit: int | None = None,
        run: dict[str, Any] | None = None,
    ):
        if total_limit is not None:
            check_count("total_limit", total_limit, 1)
        self.folder, self.total_limit, self.run = Path(folder), total_limit, run or {}
        self.accelerator, self.recycler, self.generator = accelerator, recycler, generator
        self._unfinished: Path | None = None
        self._writers: list[BankWriter] = []
        if accelerator.is_main_process:
            for leftover in self.folder.glob(f"checkpoint-*{UNFINISHED}"):
                if NAME.fullmatch(leftover.name.removesuffix(UNFINISHED)) and leftover.is_dir():
                    shutil.rmtree(leftover)
        accelerator.wait_for_everyone()

    def all(self) -> list[Path]:
        """The finished checkpoints, by step."""
        return list_checkpoints(self.folder)

    def save(self, step: int) -> None:
        """Write everything but the banks now, and begin to write them; training may go on.

        Raises:
            RuntimeError: if it, or the one before, could not be written.
        """
        self.finish()
        if self.accelerator.is_main_process and self.total_limit:
            # As diffusers' scripts do: there is never more on the disk than the limit, but always one to go back to.
            self._prune(max(self.total_limit - 1, 1))
        self._unfinished = self.folder / f"checkpoint-{step}{UNFINISHED}"
        options = {"exclude_frozen_parameters": True} if self.accelerator.state.deepspeed_plugin else {}
        rank = self.accelerator.process_index
        state = {**self.recycler.state_dict(), "noise_generator": self.generator.get_state()}
        try:
            self.accelerator.save_state(str(self._unfinished), **options)
            save_file(state, self._unfinished / f"recycler-{rank}.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._failure(error) from error
        self._writers = [save_bank(bank, self._unfinished / name) for name, bank in self._banks(rank).items()]

    def poll(self) -> None:
        """Give the checkpoint its name if every process has written its bank. Does not wait.

        Raises:
            RuntimeError: if this process could not write its bank.
        """
        try:
            for writer in self._writers:
                writer.check()
        except Exception as error:
            raise self._failure(error) from error
        if self._unfinished is None or not self.accelerator.is_main_process:
            return
        ranks = range(self.accelerator.num_processes)
        if not all((self._unfinished / name).exists() for rank in ranks for name in self._banks(rank)):
            return
        path = self._unfinished.with_name(self._unfinished.name.removesuffix(UNFINISHED))
        write_manifest(self._unfinished, _step(path), self.accelerator.num_processes, self.run)
        if path.exists():
            self._set_aside([path])
        self._unfinished.rename(path)
        self._unfinished = None
        if self.total_limit:
            self._prune(self.total_limit)

    def finish(self) -> None:
        """Wait until the checkpoint has its name. Raises what `poll` raises."""
        self._join()
        self.accelerator.wait_for_everyone()
        self.poll()
        if self._unfinished is not None and self.accelerator.is_main_process:
            raise self._failure(
                OSError("banks of other processes are not there. Is `--output_dir` the same folder for all of them?")
            )
        self.accelerator.wait_for_everyone()
        self._unfinished = None

    def newest(self) -> str:
        """Which checkpoint a run that must end here can go on from, as a sentence. One that is begun is finished."""
        self._join()
        if not self._writers:
            self.poll()
        return _newest_good(self.folder)

    def resume(self, resume_from_checkpoint: str) -> int:
        """Load a checkpoint and return its step: 0 for "latest" where there is none yet.

        Later checkpoints in the folder are of a branch that is given up. They are moved to a folder `abandoned-<n>`
        beside them, where nothing counts or removes them.

        Args:
            resume_from_checkpoint (`str`): As in [`find_checkpoint`].

        Raises:
            ValueError: as in [`find_checkpoint`]; or if its bank is damaged or of another form.
        """
        found = find_checkpoint(self.folder, resume_from_checkpoint, self.accelerator.num_processes)
        if found is None:
            logger.info(f"No checkpoint in {self.folder} yet: this is a new run.")
            return 0
        path, manifest = found
        rank = self.accelerator.process_index
        # DeepSpeed's part has no frozen weights: they are those of the base.
        options = {"load_module_strict": False} if self.accelerator.state.deepspeed_plugin else {}
        self.accelerator.load_state(str(path), **options)
        state = load_file(path / f"recycler-{rank}.safetensors")
        self.generator.set_state(state.pop("noise_generator"))
        self.recycler.load_state_dict(state)
        try:
            for name, bank in self._banks(rank).items():
                load_bank(bank, path / name)
        except ValueError as error:
            raise ValueError(f"{error} {_newest_good(path.parent, path)}") from error
        self.accelerator.wait_for_everyone()
        later = [checkpoint for checkpoint in self.all() if _step(checkpoint) > manifest.step]
        if later and self.accelerator.is_main_process:
            self._set_aside(later)
        logger.info(f"Going on from {path}.")
        return manifest.step

    def _banks(self, rank: int) -> dict[str, ErrorBank]:
        """The banks by the names of their files, those of process `rank`."""
        banks = self.recycler.banks
        if len(banks) == 1:
            return {f"bank-{rank}.safetensors": self.recycler.bank}
        return {f"bank-{rank}-{shape_name(shape)}.safetensors": bank for shape, bank in banks.items()}

    def _failure(self, error: Exception) -> RuntimeError:
        return RuntimeError(f"{self._unfinished} could not be written: {error}. {_newest_good(self.folder)}")

    def _join(self) -> None:
        """Wait for the writers of this process, and forget them unless something went wrong."""
        failed = False
        for writer in self._writers:
            try:
                writer.wait()
            except Exception:
                failed = True
        if not failed:
            self._writers = []

    def _prune(self, limit: int) -> None:
        kept, rest = self.all()[-limit:], self.all()[:-limit]
        if not any(map(_is_whole, kept)):
            rest = [path for path in rest if path != next(filter(_is_whole, reversed(rest)), None)]
        for path in rest:
            # Under this name, a kill half way leaves nothing that looks like a checkpoint.
            shutil.rmtree(path.rename(path.with_name(path.name + UNFINISHED)))
            logger.info(f"Removed {path}: no more than {self.total_limit} are kept.")

    def _set_aside(self, paths: list[Path]) -> None:
        number = 1
        while (self.folder / f"abandoned-{number}").exists():
            number += 1
        aside = self.folder / f"abandoned-{number}"
        aside.mkdir()
        for path in paths:
            path.rename(aside / path.name)
        logger.warning(
            f"{_names(paths)} of the earlier branch: moved to {aside}, where no limit removes them. Delete them if "
            "they are of no use any more."
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _is_whole(path: Path) -> bool:
    """Whether every file is there, in its size."""
    try:
        read_manifest(path)
    except DamagedError:
        return False
    return True


def _newest_good(folder: Path, but: Path | None = None) -> str:
    """Which checkpoint of a folder to go on from, as a sentence; all of it is read."""
    for path in reversed(list_checkpoints(folder)):
        if path.resolve() == but:
            continue
        try:
            check_checkpoint(path)
        except DamagedError:
            continue
        return f"The newest good checkpoint is {path.name}: `--resume_from_checkpoint {path.name}`."
    return f"There is no{' other' if but else ''} good checkpoint in {folder}."
