"""Muon: orthogonal steps for matrices, AdamW for all other parameters."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convllava.training.muon import Muon, orthogonalise, owners_of


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_orthogonalised_singular_values_are_near_one(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = torch.linalg.svdvals(matrix / matrix.norm())
    after = torch.linalg.svdvals(orthogonalise(matrix))
    assert after.max() < 1.3
    assert after[before > 0.01].min() > 0.5


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    inputs, losses = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), []
    for _ in range(count):
        loss = (model(inputs) - inputs.flip(1).square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def groups_of(model: nn.Module, muon: bool) -> list[dict]:
    return [
        {"params": [p for p in model.parameters() if p.ndim == 2], "lr": 1e-2, "weight_decay": 0.1, "muon": muon},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 1e-2, "weight_decay": 0.0},
    ]


def test_other_groups_equal_torch_adamw():
    ours, theirs = network(), network()
    steps(ours, Muon(groups_of(ours, False), betas=(0.9, 0.98)), 10)
    steps(theirs, torch.optim.AdamW(groups_of(theirs, False), betas=(0.9, 0.98)), 10)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_orthogonal_steps_reduce_the_loss():
    model = network()
    losses = steps(model, Muon(groups_of(model, True)), 200)
    assert losses[-1] < 0.1 * losses[0]


def test_loaded_state_continues_exactly():
    model = network()
    optimizer = Muon(groups_of(model, True))
    steps(model, optimizer, 5)
    twin = copy.deepcopy(model)
    resumed = Muon(groups_of(twin, True))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(model, optimizer, 5) == steps(twin, resumed, 5)


def train_together(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        torch.save(trained().state_dict(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained() -> nn.Module:
    model = network()
    steps(model, Muon(groups_of(model, True)), 5)
    return model


def test_two_processes_equal_one(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mp.spawn(train_together, (str(tmp_path),), nprocs=2)
    alone = trained().state_dict()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, weight in alone.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


def test_expensive_matrices_are_spread_over_processes():
    shapes = [(2, 2), (8, 8), (8, 4), (8, 6), (3, 2)]
    owners = owners_of([torch.empty(shape) for shape in shapes], 2)
    assert owners[1] != owners[3]
    costs = [sum(max(s) * min(s) ** 2 for s, o in zip(shapes, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert max(costs) - min(costs) <= max(max(s) * min(s) ** 2 for s in shapes)


def test_bfloat16_steps_have_the_direction_of_float32():
    matrix = torch.randn(48, 96)
    full, low = orthogonalise(matrix), orthogonalise(matrix, torch.bfloat16)
    assert low.dtype == torch.float32
    assert not low.equal(full)
    assert torch.nn.functional.cosine_similarity(full.flatten(), low.flatten(), dim=0) > 0.999
