"""The rows of each step do not depend on data loader workers, nor on how many processes share a batch."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.data import PreparedData
from tokenformer.training import Recipe
from tokenformer.training.collapse import Skip
from tokenformer.training.order import RowOrder
from tokenformer.training.run import _arguments, open_task

MakeRecipe = Callable[..., Recipe]


def passes(rows: int, seed: int, epochs: int, size: int, per_step: int = 1) -> list[list[int]]:
    """The rows of each forward pass over several epochs, as torch's random order for the seed gives them."""
    found = []
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        count = rows // size // per_step * per_step
        found += [order[size * i : size * (i + 1)] for i in range(count)]
    return found


@given(data=st.data())
def test_ranks_read_equal_parts_of_each_batch_in_their_order(data: st.DataObject) -> None:
    size, seed = 4 * data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    per_step = data.draw(st.integers(1, 3))
    rows = data.draw(st.integers(size * per_step, 60))
    expected = passes(rows, seed, 6, size, per_step)
    per_epoch = len(expected) // 6
    passed_over = data.draw(st.integers(0, 2))
    expected = expected[passed_over:]
    skips = []
    if data.draw(st.booleans()):
        first = data.draw(st.integers(1, per_epoch // per_step))
        skips = [Skip(first, "", first - 1, (first, first), 0.0)]
        del expected[(first - 1) * per_step : first * per_step]
    for world in (1, 2, 4):
        part = size // world
        orders = [
            RowOrder(
                range(rows),
                seed=seed,
                batch_size=size,
                batches_per_step=per_step,
                skips=skips,
                skip_rows=passed_over * size,
                whole_steps=True,
                rank=rank,
                world=world,
            )
            for rank in range(world)
        ]
        for epoch in (0, 2, 1):  # a resumed run begins in any epoch
            read = []
            for order in orders:
                order.set_epoch(epoch)
                assert len(order) == per_epoch * part
                read.append(list(order))
            for i in range(per_epoch):
                together = [row for rows_of_rank in read for row in rows_of_rank[part * i : part * (i + 1)]]
                assert together == expected[epoch * per_epoch + i]
                assert together == orders[0].batch(epoch * per_epoch + i)


def test_how_a_step_is_cut_into_passes_does_not_change_its_rows() -> None:
    steps = passes(45, 2, 3, 8)
    for per_step in (1, 2, 4, 8):
        order = RowOrder(range(45), seed=2, batch_size=8 // per_step, batches_per_step=per_step, whole_steps=True)
        read = []
        for epoch in range(3):
            order.set_epoch(epoch)
            read += list(order)
        assert [read[8 * step : 8 * (step + 1)] for step in range(15)] == steps


def test_places_are_those_that_one_process_counts() -> None:
    """An image is cropped by its place, so the ranks together must give each row the place that one process gives."""
    whole = RowOrder(range(20), seed=1, batch_size=4, batches_per_step=2, skip_rows=8)
    whole.set_epoch(1)
    placed = list(whole.placed())
    assert [place for _, place in placed] == list(range(8 + 20, 8 + 40))
    parts = []
    for rank in range(2):
        order = RowOrder(range(20), seed=1, batch_size=4, batches_per_step=2, skip_rows=8, rank=rank, world=2)
        order.set_epoch(1)
        parts += list(order.placed())
    assert sorted(parts, key=lambda pair: pair[1]) == placed


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 3)])
def test_parts_that_cannot_be(rank: int, world: int) -> None:
    with pytest.raises(AssertionError):
        RowOrder(range(20), seed=0, batch_size=4, batches_per_step=1, rank=rank, world=world)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_the_same_rows(workers: int, make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training__micro_batch_size=2)
    task = open_task(recipe)
    arguments = _arguments(recipe, task, "fp32", torch.device("cpu"))
    arguments.dataloader_num_workers = workers
    trainer = task.trainer(
        lambda model: {},
        run=None,
        keep_checkpoints=1,
        autocast=None,
        model=task.model,
        args=arguments,
        train_dataset=task.train_rows,
        eval_dataset=task.held_out_rows,
    )
    loader = trainer.get_train_dataloader()
    read = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        read += [batch["input_ids"] for batch in loader]
    data = PreparedData.load(recipe.data.path).train
    expected = passes(len(data), 0, 2, 2)
    assert len(read) == len(expected)
    for batch, rows in zip(read, expected, strict=True):
        assert batch.tolist() == [data[row]["input_ids"] for row in rows]
