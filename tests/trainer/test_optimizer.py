"""Optimizers: Muon's update of a matrix, the optimizer of each parameter, the schedule, and bad gradients."""

import math

import pytest
import torch
from torch import nn

from trainer.optimizer import Muon, Optimizer, OptimizerConfig, OptimizerKind, orthogonalise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 12)])
        self.head = nn.Linear(12, 3)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(0.3 * random(*parameter.shape, seed=index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def backward(net: Net) -> float:
    loss = (net(random(16, 6)) - random(16, 3, seed=1)).square().mean()
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("shape", [(3, 8, 24), (3, 24, 8), (1, 64, 16)])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_singular_values(shape):
    matrices = random(*shape) * torch.tensor([1.0, 100.0, 1e-3])[: shape[0], None, None]
    result = orthogonalise(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    rotated = left.mT @ result @ right.mT
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_orthogonalising_zeros_gives_zeros():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


def test_muon_moves_a_matrix_by_a_fifth_of_the_learning_rate_and_decays_it():
    weight = nn.Parameter(torch.ones(8, 24))
    weight.grad = random(8, 24)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    change = weight.detach() - (1 - 0.1 * 0.5)
    assert 0.6 * 0.02 < change.square().mean().sqrt() < 1.3 * 0.02
    assert (change * random(8, 24)).sum() < 0


def test_muon_treats_a_matrix_the_same_alone_and_among_others_of_its_shape():
    alone, first, second = (nn.Parameter(torch.zeros(4, 8)) for _ in range(3))
    alone.grad = first.grad = random(4, 8)
    second.grad = random(4, 8, seed=1)
    Muon([alone], lr=1.0, weight_decay=0).step()
    Muon([first, second], lr=1.0, weight_decay=0).step()
    assert torch.allclose(alone, first, atol=1e-6) and not torch.allclose(first, second, atol=1e-2)


def test_muon_updates_the_weights_inside_blocks_and_adamw_the_rest():
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(kind=OptimizerKind.muon, lr=0.01), 10)
    adamw, muon = (
        {id(parameter) for group in each.param_groups for parameter in group["params"]} for each in optimizer.optimizers
    )
    assert muon == {id(block.weight) for block in net.blocks}
    assert adamw == {id(parameter) for parameter in net.parameters()} - muon


def test_muon_treats_a_kernel_as_a_matrix_of_its_outputs():
    kernel, matrix = nn.Parameter(torch.zeros(4, 3, 2, 2)), nn.Parameter(torch.zeros(4, 12))
    kernel.grad = random(4, 3, 2, 2)
    matrix.grad = kernel.grad.flatten(1)
    for parameter in (kernel, matrix):
        Muon([parameter], lr=1.0, weight_decay=0).step()
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6) and matrix.abs().max() > 0


@pytest.mark.parametrize("kind", OptimizerKind)
def test_either_kind_learns(kind):
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(kind=kind, lr=0.02, betas=[0.9, 0.99]), 60)
    losses = []
    for _ in range(60):
        losses.append(backward(net))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_parameters_stay():
    net = Net()
    net.blocks[0].requires_grad_(False)
    before = net.blocks[0].weight.clone()
    optimizer = Optimizer(net, OptimizerConfig(kind=OptimizerKind.muon, lr=0.1, weight_decay=0.5), 10)
    backward(net)
    optimizer.step()
    assert torch.equal(net.blocks[0].weight, before)


def test_the_learning_rate_rises_over_the_warmup_and_falls_to_a_twentieth():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, decay_fraction=0.5)
    optimizer = Optimizer(Net(), config, total_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.lr)
        optimizer.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert optimizer.lr == pytest.approx(0.05)


def test_the_scheduled_rate_is_the_one_applied():
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(lr=0.1, betas=[0.0, 0.0], weight_decay=0, warmup_steps=10), 10)
    before = net.head.bias.detach().clone()
    backward(net)
    optimizer.step()
    assert torch.allclose((net.head.bias - before).abs(), torch.tensor(0.01), rtol=1e-3)


def test_the_gradient_is_clipped_to_the_norm_that_is_returned_before():
    net = Net()
    config = OptimizerConfig(lr=1e-9, clip_norm=0.5)
    optimizer = Optimizer(net, config, 10)
    backward(net)
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in net.parameters()))
    clipped = []
    optimizer.optimizers[0].register_step_pre_hook(
        lambda each, *_: clipped.extend(p.grad.clone() for p in each.param_groups[0]["params"])
    )
    assert optimizer.step() == pytest.approx(norm)
    assert norm > 0.5
    assert math.sqrt(sum(grad.square().sum().item() for grad in clipped)) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", OptimizerKind)
def test_a_gradient_that_is_not_finite_updates_nothing_and_is_forgotten(bad, kind):
    net = Net()
    optimizer = Optimizer(net, OptimizerConfig(kind=kind, lr=0.1), 10)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    backward(net)
    net.head.bias.grad[0] = bad
    assert not math.isfinite(optimizer.step())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert optimizer.steps_done == 1
    backward(net)
    assert math.isfinite(optimizer.step())
    assert all(value.isfinite().all() for value in net.state_dict().values())
    assert not torch.equal(net.head.bias, before["head.bias"])


@pytest.mark.parametrize("kind", OptimizerKind)
def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped(kind):
    config = OptimizerConfig(kind=kind, lr=0.05, betas=[0.9, 0.99], warmup_steps=3)
    whole, first = Net(), Net()
    uninterrupted, interrupted = Optimizer(whole, config, 10), Optimizer(first, config, 10)
    for net, optimizer in ((whole, uninterrupted), (first, interrupted)):
        for _ in range(2):
            backward(net)
            optimizer.step()
    second = Net()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer(second, config, 10)
    resumed.load_state_dict(interrupted.state_dict())
    for net, optimizer in ((whole, uninterrupted), (second, resumed)):
        backward(net)
        optimizer.step()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [({"lr": 0}, "lr=0"), ({"betas": [0.9]}, "betas="), ({"decay_fraction": 1.5}, "decay_fraction=1.5")],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)
