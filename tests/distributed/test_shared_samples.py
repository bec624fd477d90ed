"""Two processes make the sample videos of training together."""

import json
from pathlib import Path

import pytest
import torch

from scripts.endurance.kills import start_ranks, wait
from trainer.samples import make_together, shared_rounds
from utils.distributed import Ranks, init_distributed, shutdown_distributed

COUNT, BATCH = 7, 2


@pytest.mark.parametrize(("count", "processes", "batch"), [(8, 1, 3), (8, 2, 2), (7, 2, 2), (1, 4, 1), (5, 3, 2)])
def test_every_video_is_made_in_equally_many_equal_batches(count, processes, batch):
    shares = [shared_rounds(count, Ranks(rank, processes), batch) for rank in range(processes)]
    assert len({len(rounds) for rounds in shares}) == 1
    assert all(len(indices) == batch for rounds in shares for indices in rounds)
    in_order = [index for together in zip(*shares, strict=True) for indices in together for index in indices]
    assert in_order == list(range(len(in_order))) and count <= len(in_order) < count + processes * batch


def work(folder: Path) -> None:
    """Record, in each process, which videos it has made and which it has received."""
    ranks, made = init_distributed("cpu"), []

    def make(indices: list[int]) -> torch.Tensor:
        made.extend(indices)
        return torch.tensor(indices, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 5)

    videos = make_together(make, COUNT, ranks, batch=BATCH)
    got = [[video.mean().item(), *video.shape] for video in videos]
    (folder / f"{ranks.rank}.json").write_text(json.dumps({"made": made, "got": got}))
    shutdown_distributed()


def test_two_processes_share_the_work_and_the_main_one_gets_all(tmp_path):
    wait(start_ranks(work, (tmp_path,), 2), timeout=240)
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (main["made"], other["made"]) == ([0, 1, 4, 5], [2, 3, 6, 0])
    assert main["got"] == [[index, 2, 3, 4, 5] for index in range(COUNT)] and other["got"] == []
