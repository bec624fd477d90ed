"""scripts/train.slurm with fake Slurm commands: every task gets its rank, and unfinished jobs are queued again."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train.slurm"
PLACE = "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT"
STANDINS = {
    "srun": 'shift; for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@"; done',
    "scontrol": '[ "$1" = show ] && printf "first\\nsecond\\n" || echo "scontrol $*"',
    "python": f'echo "{PLACE}: $*"\n[ $FINISHES = no ] || mkdir -p run/model',
}


@pytest.mark.parametrize("finishes", ["yes", "no"])
def test_tasks_learn_their_place_and_an_unfinished_job_requeues(tmp_path, finishes):
    for name, body in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "any"}
    done = subprocess.run(
        ["bash", str(SCRIPT), "some.yaml", "run", "trainer.steps=9"],
        cwd=tmp_path,
        env=os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FINISHES": finishes},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    flags = "train.py --config_path some.yaml --logdir run parallel.shard_size=2 trainer.steps=9"
    tasks = [f"{rank}/2 {rank} first 20007: {flags}" for rank in (0, 1)]
    assert done.stdout.splitlines() == tasks + ["scontrol requeue 7"] * (finishes == "no")
