"""`ShardedErrorBank`: one logical bank of which every process keeps some of the grids.

Processes draw different switches and so want different errors at different steps. Every exchange here has the same
collectives, in the same order, on every process, whatever is wanted: first all requests are gathered, from which
everyone knows what goes where, then the errors travel.
"""

import torch
import torch.distributed as dist

from .bank import BankConfig, ErrorBank, StoredError, choose_places


class ShardedErrorBank(ErrorBank):
    """An [`ErrorBank`] whose grids are dealt out to all processes: n processes keep n times as many errors.

    `torch.distributed` must be initialized. All processes must call `synchronize`, `draw` and `add` together.

    Args:
        error_shape, grid_sigmas, config: As in [`ErrorBank`]; a `byte_budget` is that of one process.
        device (`torch.device` or `str`, defaults to `"cpu"`):
            Where errors are while they travel: the process's own GPU if the backend is NCCL.
    """

    shared = True

    def __init__(
        self,
        error_shape: tuple[int, ...],
        grid_sigmas: torch.Tensor,
        config: BankConfig,
        device: torch.device | str = "cpu",
    ):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Dealt out in turn: errors of one step fall on neighbouring grids, and every process takes some.
        super().__init__(error_shape, grid_sigmas, config, list(range(self.rank, config.num_grids, self.world_size)))
        self.device = torch.device(device)
        self.all_counts = self.counts.clone()

    def synchronize(self) -> None:
        counts = self.counts.clone().to(self.device)
        dist.all_reduce(counts)
        self.all_counts = counts.cpu()

    def filled(self) -> torch.Tensor:
        return self.all_counts > 0

    def draw(self, grids: torch.Tensor, generator: torch.Generator) -> list[StoredError | None]:
        shares = torch.rand(len(grids), generator=generator, dtype=torch.float64)
        requests = self._gather(torch.stack([grids.double(), shares], dim=1))
        places = [
            choose_places(asked[:, 0].long().tolist(), asked[:, 1].tolist(), self.all_counts) for asked in requests
        ]
        answers = [
            [torch.cat([error.residual.flatten(), torch.tensor([error.sigma])]) for error in self._own(asked)]
            for asked in places
        ]
        owners = {
            index: place[0] % self.world_size for index, place in enumerate(places[self.rank]) if place is not None
        }
        rows = iter(self._exchange(answers, list(owners.values())))
        # Errors come sorted by the process they are from, and within it in the order they were asked for.
        received: dict[int, StoredError] = {}
        for index in sorted(owners, key=lambda index: owners[index]):
            row = next(rows)
            received[index] = StoredError(row[:-1].view(self.error_shape), float(row[-1]))
        return [received.get(index) for index in range(len(grids))]

    def add(
        self, residuals: torch.Tensor, sigmas: torch.Tensor, keep: torch.Tensor, generator: torch.Generator
    ) -> None:
        grids = torch.where(keep.cpu(), self.nearest_grid(sigmas), -1)
        everyones = self._gather(grids)
        outgoing = [
            [
                torch.cat([residuals[index].flatten().float(), sigmas[index : index + 1].float()])
                for index, grid in enumerate(grids.tolist())
                if grid >= 0 and grid % self.world_size == rank
            ]
            for rank in range(self.world_size)
        ]
        mine = [  # who sends, and where it goes
            (rank, grid)
            for rank, row in enumerate(everyones.tolist())
            for grid in row
            if grid >= 0 and grid % self.world_size == self.rank
        ]
        for (_, grid), row in zip(mine, self._exchange(outgoing, [rank for rank, _ in mine]), strict=True):
            self.put(grid, row[:-1], float(row[-1]), generator)

    def _own(self, places: list[tuple[int, int] | None]) -> list[StoredError]:
        return [self.get(*place) for place in places if place is not None and place[0] % self.world_size == self.rank]

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of every process, `(world_size, *values.shape)`, on the CPU."""
        values = values.to(self.device).contiguous()
        gathered = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered).cpu()

    def _exchange(self, outgoing: list[list[torch.Tensor]], senders: list[int]) -> torch.Tensor:
        """Send rows of errors, a list for every process; receive one from each of `senders`, sorted by them."""
        width = self.size + 1
        rows = [row.to(self.device) for to_rank in outgoing for row in to_rank]
        sent = torch.stack(rows) if rows else torch.empty(0, width, device=self.device)
        received = torch.empty(len(senders), width, device=self.device)
        dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=[senders.count(rank) for rank in range(self.world_size)],
            input_split_sizes=[len(to_rank) for to_rank in outgoing],
        )
        return received.cpu()
