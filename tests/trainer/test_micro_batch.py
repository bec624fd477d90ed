"""A sample of a global batch gets the same random numbers in any process and any micro-batch."""

import pytest
import torch

from trainer.micro_batch import MicroBatch, plan_batches
from utils.distributed import Ranks
from utils.errors import UserError


def micro_batches(micro: int, total: int, world_size: int) -> list[MicroBatch]:
    plans = [plan_batches(micro, total, Ranks(rank, world_size)) for rank in range(world_size)]
    return [each for plan in plans for each in plan.divide(range(100, 100 + total), seed=3)]


@pytest.mark.parametrize(("micro", "world_size"), [(8, 1), (4, 2), (1, 8), (2, 1), (1, 2)])
def test_every_division_covers_the_batch_once_with_the_same_numbers(micro, world_size):
    (whole,) = micro_batches(8, 8, 1)
    parts = micro_batches(micro, 8, world_size)
    assert [index for part in parts for index in part.indices] == list(range(100, 108))
    like = torch.empty(micro, 2, 3)
    assert torch.equal(
        torch.cat([part.randn("noise", like) for part in parts]), whole.randn("noise", torch.empty(8, 2, 3))
    )

    def drawn(part: MicroBatch) -> torch.Tensor:
        return part.of(torch.rand(part.total, generator=part.generator("levels")))

    assert torch.equal(torch.cat([drawn(part) for part in parts]), drawn(whole))
    clips = torch.zeros(8, 4)
    shaken = [part.each(lambda clip, g: clip + torch.rand(4, generator=g), "shake", part.of(clips)) for part in parts]
    expected = whole.each(lambda clip, g: clip + torch.rand(4, generator=g), "shake", clips)
    assert torch.equal(torch.cat(shaken), expected)


def test_samples_purposes_and_updates_have_streams_of_their_own():
    (batch,) = micro_batches(4, 4, 1)
    other = MicroBatch(seed=4, batch=batch.batch, number=0, start=0, size=4)
    like = torch.empty(4, 8)
    drawn = torch.cat([batch.randn("a", like), batch.randn("b", like), other.randn("a", like)])
    assert len({tuple(row) for row in drawn.tolist()}) == 12
    assert torch.equal(batch.randn("a", like), drawn[:4])


@pytest.mark.parametrize(("micro", "world_size"), [(4, 1), (2, 2), (1, 4), (1, 1)])
def test_weighted_means_of_parts_average_to_the_mean_over_what_counts(micro, world_size):
    values = torch.rand(4, 3)
    counted = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()
    means = [
        part.weight(counted) * part.of(values)[part.of(counted)].sum() / max(1, int(part.of(counted).sum()))
        for part in micro_batches(micro, 4, world_size)
    ]
    assert torch.stack(means).mean() == pytest.approx(values[counted].mean().item())


def test_the_total_is_one_pass_a_process_unless_asked_otherwise():
    assert plan_batches(3, None, Ranks(1, 2)).total == 6
    plan = plan_batches(3, 12, Ranks(1, 2))
    assert plan.passes == 2 and plan.local == 6 and plan.total == 12


@pytest.mark.parametrize(("micro", "total", "world_size"), [(2, 3, 1), (1, 3, 2), (8, 4, 1)])
def test_a_total_that_does_not_divide_is_refused_with_its_numbers(micro, total, world_size):
    message = f"trainer.total_batch_size={total} is not a multiple of .*trainer.batch_size={micro} x {world_size} proc"
    with pytest.raises(UserError, match=message):
        plan_batches(micro, total, Ranks(0, world_size))
