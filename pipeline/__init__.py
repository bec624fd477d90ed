"""The autoregressive rollout, many-step sampling, and the pipeline that turns prompts into videos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.pretrained import SelfForcingPipeline

__all__ = ["SelfForcingPipeline"]


def __getattr__(name: str) -> Any:
    """Import the pipeline at its first use, because it imports torch and ``--help`` must not wait for that."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline.pretrained import SelfForcingPipeline

    return SelfForcingPipeline
