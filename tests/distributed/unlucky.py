"""What goes wrong in one process of a training of test_two_processes.py."""

import os
import sys
import time

from trainer.self_forcing import SelfForcingTrainer
from trainer.trainer import Trainer


def prepare() -> None:
    """Give process 1 a bad loss in its second step, and let it die after its third."""
    if os.environ["RANK"] != "1":
        return
    report, critic_loss = Trainer.report, SelfForcingTrainer.critic_loss

    def poisoned(self, *arguments):
        loss = critic_loss(self, *arguments)
        bad = float("nan") if self.step == 1 else 1
        return loss._replace(
            total=loss.total * bad, metrics={name: bad * value for name, value in loss.metrics.items()}
        )

    def dying(self, *arguments, **options):
        report(self, *arguments, **options)
        if self.step == 3:
            print(f"died at {time.time()}", file=sys.stderr, flush=True)
            raise RuntimeError("rank 1 is out of luck")

    SelfForcingTrainer.critic_loss, Trainer.report = poisoned, dying
