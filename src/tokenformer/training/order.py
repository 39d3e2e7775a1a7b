"""Which rows a run reads at each step: a function of the recipe and the step alone.

Neither the number of data loader workers, nor the number of processes that share a batch, nor where a run was stopped
and resumed has a say in it.
"""

from collections.abc import Iterator, Sequence, Sized

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from tokenformer.training.collapse import Skip


class RowOrder(Sampler[int]):
    """The rows of one epoch after another, each in a random order of its own, without the batches that were skipped.

    The rows of forward pass `i` of the whole run, over all processes together, are those of `batch(i)`: they follow
    from the number of rows, the seed and the sizes below. `world` processes that share them read equal parts, in the
    order of their ranks, so that the parts put together are the batch that one process reads. Ranks that must see the
    same rows, as in tensor parallelism, are given the same `rank`.

    The batches of all epochs are one sequence; where some are left out, the later ones move forward, across the ends of
    epochs. An epoch keeps its number of batches.

    Args:
        rows: the training rows.
        seed: of the order.
        batch_size: rows of a forward pass of all processes together; a multiple of `world`.
        batches_per_step: forward passes of an optimizer step.
        skips: what to leave out.
        skip_rows: rows to pass over first; the order of the next epoch then begins that many rows before the end.
        whole_steps: leave out the rows at the end of an epoch that do not fill a step, which would be a smaller one.
            How a step is cut into forward passes then has no say in its rows either.
        rank: whose part this is, from 0.
        world: parts that a batch has.
    """

    def __init__(
        self,
        rows: Sized,
        *,
        seed: int,
        batch_size: int,
        batches_per_step: int,
        skips: Sequence[Skip] = (),
        skip_rows: int = 0,
        whole_steps: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        assert batch_size % world == 0, f"{batch_size} rows in {world} parts"
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.batches_per_epoch = len(rows) // batch_size
        if whole_steps:
            self.batches_per_epoch -= self.batches_per_epoch % batches_per_step
        self.skips = skips
        self.skip_batches = -(-skip_rows // batch_size)
        self.part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.epoch = 0
        self._shuffled = SeedableRandomSampler(rows, data_seed=seed)
        self._order: list[int] = []
        self._order_of = -1

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass, as for any sampler of accelerate."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches_per_epoch * (self.part.stop - self.part.start)

    def __iter__(self) -> Iterator[int]:
        return (row for row, _ in self.placed())

    def placed(self) -> Iterator[tuple[int, int]]:
        """This rank's rows of the epoch, each with its place in the order that all ranks share."""
        passed_over = self.skip_batches * self.batch_size
        for number in range(self.epoch * self.batches_per_epoch, (self.epoch + 1) * self.batches_per_epoch):
            first = passed_over + number * self.batch_size
            yield from list(zip(self.batch(number), range(first, first + self.batch_size), strict=True))[self.part]

    def batch(self, number: int) -> list[int]:
        """The rows of a forward pass, of all ranks together; passes are counted from 0 over all epochs."""
        epoch, position = divmod(self.skip_batches + self._before_skips(number), self.batches_per_epoch)
        if epoch != self._order_of:
            self._shuffled.set_epoch(epoch)
            self._order, self._order_of = list(self._shuffled), epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def _before_skips(self, batch: int) -> int:
        """Which batch of the order without skips now stands where `batch` stood."""
        for skip in reversed(self.skips):
            first, stop = self._first_batch(skip.skipped_batches[0]), self._first_batch(skip.skipped_batches[1] + 1)
            if batch >= first:
                batch += stop - first
        return batch

    def _first_batch(self, step: int) -> int:
        """The first forward pass of an optimizer step, both counted over all epochs; steps count from 1."""
        steps_per_epoch = -(-self.batches_per_epoch // self.batches_per_step)
        epoch, position = divmod(step - 1, steps_per_epoch)
        return epoch * self.batches_per_epoch + position * self.batches_per_step
