"""How needs of memory are told: phases, one after the other, each with what lies on the GPU meanwhile."""

from collections.abc import Mapping
from dataclasses import dataclass


GIB = 2**30
# Cards that people have, in GiB.
CARDS = (12, 24, 80)
# What a process takes of a card beside its tensors: CUDA's context, the workspaces of its libraries, and what the
# allocator cannot use of what it holds. An assumption, not a measurement.
RESERVE = int(1.5e9)


@dataclass(frozen=True)
class Phase:
    """A part of the work.

    Args:
        name (`str`): What is done.
        parts (`dict[str, int]`): What lies on the GPU when it needs most, in bytes.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def num_bytes(self) -> int:
        """On the GPU at most."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a piece of work needs.

    Args:
        phases (`tuple[Phase, ...]`): Its parts, one after the other.
        host (`dict[str, int]`): What lies in the machine's memory at most, in bytes.
    """

    phases: tuple[Phase, ...]
    host: Mapping[str, int]

    @property
    def gpu_bytes(self) -> int:
        """On the GPU at most."""
        return max(phase.num_bytes for phase in self.phases)

    @property
    def host_bytes(self) -> int:
        """In the machine's memory."""
        return sum(self.host.values())

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.num_bytes)

    def fits(self, gibibytes: float) -> bool:
        """Whether a card of so many GiB has room for it, and for `RESERVE` beside it."""
        return self.gpu_bytes + RESERVE <= gibibytes * GIB
