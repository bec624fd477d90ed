"""Distributes an existing model over processes: FSDP2, mixed precision, compilation, offload.

Every transformer block is a unit, and so is the rest of the transformer. The weights of a unit are gathered only while
it runs. Small modules (codec, text encoder, discriminator heads) are replicated. Their gradients are averaged before
the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model.denoiser import Denoiser
from model.transformer import WanTransformer
from pipeline.optimize import CompileMode, compile_blocks
from utils.bounds import AT_LEAST_1, require
from utils.distributed import Ranks, device_mesh, resolve_dtype
from utils.errors import UserError


@dataclass
class ParallelConfig:
    """How models are distributed over processes, and in which precision they compute."""

    shard_size: int | None = None
    """The number of processes that together hold one copy of the weights. null: all. Fewer: hybrid sharding."""
    precision: str = "auto"
    """Precision of forward and backward passes: auto (bfloat16 on CUDA, else float32), bfloat16 or float32.
    Trained weights, their gradients' sums and the optimizers stay in float32."""
    compile: bool = False
    """Compile the blocks with torch.compile: one graph for all of them in each kind of pass."""
    reduce_every_pass: bool = False
    """Sum gradients over the processes after every micro-batch. This takes more messages, but a process then keeps its
    shard of the float32 gradients between micro-batches, not the whole (5.7 GB at 1.3B, 57 GB at 14B)."""
    offload_teacher: bool = False
    """Keep the frozen teacher's shards in CPU memory."""
    offload_trained: bool = False
    """Keep the shards of trained transformers and their optimizers in CPU memory, and step there."""

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"precision={self.precision!r} must be auto, bfloat16 or float32")
        require(self, AT_LEAST_1, "shard_size")


class Parallelism:
    """Applies a :class:`ParallelConfig` to denoisers.

    One process that computes in float32 needs no preparation: its modules are not changed.

    Raises:
        UserError: the processes do not divide into groups of ``shard_size``.
    """

    def __init__(self, config: ParallelConfig, device: torch.device, ranks: Ranks) -> None:
        self.config = config
        self.dtype = resolve_dtype(config.precision, device)
        self.device = device
        size = config.shard_size or ranks.world_size
        if ranks.world_size % size:
            raise UserError(
                f"parallel.shard_size={size} does not divide the {ranks.world_size} processes; "
                "choose a divisor, such as the GPUs of one machine, or null"
            )
        offload = config.offload_teacher or config.offload_trained
        self.active = ranks.world_size > 1 or self.dtype != torch.float32 or offload
        if self.active:
            shape = (size,) if size == ranks.world_size else (ranks.world_size // size, size)
            self.mesh = device_mesh(device, shape, ("replicate", "shard")[-len(shape) :])

    @property
    def loading_device(self) -> torch.device:
        """The device to which weights are read. Sharding then moves them, block by block."""
        return torch.device("cpu") if self.active else self.device

    def loading_dtype(self, dtype: torch.dtype, *, merges: bool) -> torch.dtype | None:
        """Return the dtype in which to read weights that will have ``dtype``. None: the stored dtype.

        Weights in their stored dtype are memory-mapped, and all processes of a machine share this memory. Sharding
        converts them block by block, so a process never holds a whole model. ``merges``: a LoRA is merged into the
        weights, which needs full precision.
        """
        return None if self.active and not merges else dtype

    def trained(self, denoiser: Denoiser) -> Denoiser:
        """Prepare a denoiser to be trained: float32 weights in shards, gradients summed in float32."""
        return self._apply(denoiser, torch.float32, offload=self.config.offload_trained)

    def frozen(self, denoiser: Denoiser) -> Denoiser:
        """Prepare a denoiser that is not trained: weights in :attr:`dtype`."""
        return self._apply(denoiser.requires_grad_(False), self.dtype, offload=self.config.offload_teacher)

    def _apply(self, denoiser: Denoiser, dtype: torch.dtype, *, offload: bool) -> Denoiser:
        transformer = denoiser.transformer
        if self.config.compile:
            compile_blocks(transformer, CompileMode.default)
        if self.active:
            self._shard(transformer, dtype, offload=offload)
        return denoiser

    def _shard(self, transformer: WanTransformer, dtype: torch.dtype, *, offload: bool) -> None:
        # Inputs are not cast here: timesteps must stay in float32.
        precision = {"param_dtype": self.dtype, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
        pinned = self.device.type == "cuda"
        options = {
            "mesh": self.mesh,
            "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
            # The outermost unit too. If it stayed gathered after a pass without grad, it would miss the next update.
            "reshard_after_forward": True,
        }
        inner = MixedPrecisionPolicy(**precision)
        # The warning is about changing keys and values in place. They are only read.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for block in transformer.blocks:
            block.to(dtype)
            text = block.cross_attn  # keys and values of a prompt are made outside the block, once for all chunks
            fully_shard([text.k, text.norm_k, text.v], mp_policy=inner, **options)
            fully_shard(block, mp_policy=inner, **options)
        for name, part in transformer.named_children():
            if name != "blocks":
                part.to(dtype)
        fully_shard(transformer, mp_policy=MixedPrecisionPolicy(**precision, output_dtype=torch.float32), **options)
        register_fsdp_forward_method(transformer, "features")
        transformer.patch_embedding.register_forward_pre_hook(_to_weight_dtype)


def _to_weight_dtype(layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0].to(layer.weight.dtype),)


def synchronise_gradients(module: nn.Module, enabled: bool) -> None:
    """Set whether the next backward passes sum gradients over processes. If not, a later pass sums them."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def average_replicated(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of parameters that are not sharded by their means over the processes."""
    gradients = [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]
    if not dist.is_initialized() or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over processes."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds. An ordinary tensor is returned unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every process. An ordinary tensor is returned unchanged. All processes must call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_rows(rows: Tensor) -> Tensor:
    """Return this process's rows [b ...] as a part of the rows [B ...] of all. A single process gets them unchanged."""
    if not dist.is_initialized():
        return rows
    mesh = device_mesh(rows.device, (dist.get_world_size(),), ("rows",))
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)


def own_shape(rows: Tensor) -> tuple[int, ...]:
    """Return the shape of this process's equal share of the rows of [B ...]."""
    return (len(rows) // (dist.get_world_size() if dist.is_initialized() else 1), *rows.shape[1:])


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, which every process holds whole, like ``like``. No change if ``like`` is not sharded."""
    if not is_sharded(like):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def full_state(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """State dict of whole tensors, copied to the CPU one by one if ``keep``, else empty. Every process must call it."""
    state = {}
    for name, tensor in module.state_dict().items():
        gathered = whole(tensor)
        if keep:
            state[name] = gathered.to("cpu", copy=True)
    return state
