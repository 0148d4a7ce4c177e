"""How far a film is: bars where somebody watches, lines where nobody does."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm
from tqdm.autonotebook import tqdm as notebook_tqdm
from tqdm.std import tqdm as terminal_tqdm


class Progress:
    """Clips of a film, with the time that is left: a bar in a terminal or notebook, else a line a clip on stderr.

    Several processes write lines: their bars would be written over one another.

    Args:
        total (`int`, *optional*): Clips of the film, if it is known.
        done (`int`): Those made before.
        config (`dict`): Of the bars, as `set_progress_bar_config` takes it; with `disable=True` nothing is told.
    """

    def __init__(self, total: int | None, done: int, config: Mapping[str, Any]):
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
        watched = alone and (notebook_tqdm is not terminal_tqdm or config.get("file", sys.stderr).isatty())
        self._total, self._first, self._done = total, done, done
        self._told_in_lines = not watched and not config.get("disable", False)
        self._began = time.monotonic()
        # Bars in a log are a line for every step.
        self.config = {**config, **({} if watched else {"disable": True})}
        self._bar = tqdm(total=total, initial=done, **{"desc": "Clips", **self.config})

    def clip_done(self) -> None:
        """One more."""
        self._done += 1
        self._bar.update()
        if self._told_in_lines:
            each = (time.monotonic() - self._began) / (self._done - self._first)
            of, left = "", ""
            if self._total is not None:
                of, left = f" of {self._total}", f", {tqdm.format_interval(each * (self._total - self._done))} left"
            clip = f"{self.config['desc']}, clip" if self.config.get("desc") else "Clip"
            tqdm.write(f"{clip} {self._done}{of}: {each:.1f} s a clip{left}.", file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
