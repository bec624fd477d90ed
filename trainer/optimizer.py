"""Optimizers (AdamW, or Muon for matrices and AdamW for the rest), learning-rate schedule, and clipping."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from trainer.parallelize import is_sharded, local_part, sharded_like, whole
from utils.bounds import NOT_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_1, require


class OptimizerKind(Enum):
    """The rule that updates matrices."""

    adamw = "adamw"
    muon = "muon"


@dataclass
class OptimizerConfig:
    """The settings of a network's optimizer."""

    kind: OptimizerKind = OptimizerKind.adamw
    """AdamW for all weights, or Muon for the matrices of blocks and the kernels of 2-d convolutions."""
    lr: float = 2e-6
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    """AdamW's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip_norm: float = 10.0
    """Largest gradient norm."""
    warmup_steps: int = 0
    """The number of first steps in which the learning rate rises linearly."""
    decay_fraction: float = 0.0
    """The last share of the run, in which the learning rate falls linearly to a twentieth."""

    def __post_init__(self) -> None:
        require(self, POSITIVE, "lr", "clip_norm")
        require(self, NOT_NEGATIVE, "weight_decay", "warmup_steps")
        require(self, SHARE_BELOW_1, "betas")
        require(self, SHARE, "decay_fraction")
        if len(self.betas) != 2:
            raise ValueError(f"betas={self.betas} must be two numbers")


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move matrices [K M N] towards the nearest orthogonal ones by Newton-Schulz iteration (Jordan, Muon)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalises the momentum and scales it to the RMS of an AdamW update (arXiv 2502.16982).

    It computes in the dtype of the gradient. torch.optim.Muon (torch >= 2.9) iterates in bfloat16, which is ten times
    slower on a CPU without bfloat16 units.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix (or kernel, as output x rest) with a gradient; equal shapes are done together.

        Sharded matrices are gathered first, because the iteration needs the whole matrix.
        """
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack([whole(self._momentum(parameter, group["momentum"])) for parameter in parameters])
                updates = orthogonalise(momenta.flatten(2)).view_as(momenta)
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5 * group["lr"]
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    local_part(parameter).sub_(local_part(sharded_like(update, parameter)), alpha=scale)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


class Optimizer:
    """The optimizers of one module. They step together and share one learning-rate schedule.

    Args:
        module: the module. Its parameters that require gradient are updated.
        config: rule and hyper-parameters.
        total_steps: updates in the whole run, for the schedule.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.steps_done = 0
        self.module = module
        self.named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        matrices = _matrices(module) if config.kind is OptimizerKind.muon else []
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.named.values() if id(parameter) not in chosen]
        # No optimizer accepts sharded and ordinary parameters together.
        groups = [[p for p in rest if is_sharded(p)], [p for p in rest if not is_sharded(p)]]
        betas = tuple(config.betas)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(group, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
            for group in groups
            if group
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay))

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        config, done = self.config, self.steps_done
        rise = min(1.0, (done + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        decay_steps = config.decay_fraction * self.total_steps
        left = (self.total_steps - done) / decay_steps if decay_steps else 1.0
        return config.lr * rise * max(0.05, min(1.0, left))

    def step(self, *, skip: bool = False) -> float:
        """Clip, update, clear the gradients; returns the gradient norm.

        Nothing is updated if a gradient is not finite, or if ``skip`` is set. The schedule goes on.
        """
        norm = clip_gradients(self.named.values(), self.config.clip_norm)
        if not skip and math.isfinite(norm):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.lr
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return norm

    def state_dict(self) -> dict[str, Tensor | int]:
        """Return ``steps_done``, and the optimizer state of each parameter as ``<parameter>/<field>``."""
        names = {parameter: name for name, parameter in self.named.items()}
        fields = {
            f"{names[parameter]}/{field}": value
            for optimizer in self.optimizers
            for parameter, state in optimizer.state.items()
            for field, value in state.items()
        }
        return {"steps_done": self.steps_done, **fields}

    def room_for(self, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return empty tensors for a saved state that is given on the meta device, sharded like the parameters."""
        room = {}
        for key, described in saved.items():
            if (parameter := self.named.get(key.rpartition("/")[0])) is None:
                continue  # a checkpoint of another network: names and shapes are checked later
            fits = described.shape == parameter.shape
            like = parameter.detach() if fits else torch.empty(described.shape, device=parameter.device)
            room[key] = torch.zeros_like(like, dtype=described.dtype)
        return room

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore the result of :meth:`state_dict`."""
        self.steps_done = state["steps_done"]
        owners = {
            parameter: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            if name:
                parameter = self.named[name]
                owners[parameter].state[parameter][field] = value


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale the gradients of all parameters, sharded or not, so that their joint norm is at most ``largest``.

    Returns:
        the norm before scaling, the same on every process.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [[g for g in gradients if is_sharded(g)], [g for g in gradients if not is_sharded(g)]]
    norms = [whole(nn.utils.get_total_norm(part)).float() for part in parts if part]
    if not norms:
        return 0.0
    norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        if part:
            torch._foreach_mul_([local_part(g) for g in part], factor.to(part[0].device))
    return norm.item()


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers inside blocks and of 2-d convolutions."""
    return [
        layer.weight
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and "block" in name))
        and layer.weight.requires_grad
    ]
