"""Muon: momentum whose every step is made orthogonal, for the matrices inside a network; AdamW for everything else.

On two cores the dense stage reaches a loss with it in about two thirds of the time that AdamW needs. torch.optim.Muon
orthogonalises in bfloat16 always, which a CPU without bfloat16 arithmetic emulates so slowly that nothing is won; this
one does it in the precision of the stage, and keeps both kinds of parameters in one optimiser, as the Trainer wants.

Muon: Keller Jordan et al., 2024. Its steps are scaled to a root mean square of one, as AdamW's first steps have, so
that one learning rate serves a part's matrices and vectors (arXiv 2502.16982, section 2.2, with 1 in place of 0.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """The (rows, columns) matrix with its singular values moved near one, by Newton-Schulz iteration in a precision."""
    a, b, c = _QUINTIC
    x = (matrix / (matrix.norm() + 1e-7)).to(precision)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def orthogonalise_all(matrices: Sequence[Tensor], precision: torch.dtype = torch.float32) -> list[Tensor]:
    """The matrices, each orthogonalised; where several processes have the same ones, each does its share for all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonalise(matrix, precision) for matrix in matrices]
    owners, rank = owners_of(matrices, dist.get_world_size()), dist.get_rank()
    found = [
        orthogonalise(matrix, precision) if owner == rank else torch.zeros_like(matrix)
        for matrix, owner in zip(matrices, owners, strict=True)
    ]
    together = torch.cat([matrix.flatten() for matrix in found])
    dist.all_reduce(together)
    parts = together.split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]


def owners_of(matrices: Sequence[Tensor], processes: int) -> list[int]:
    """The process that orthogonalises each matrix: the dearest first, each to the one that has least to do."""
    costs = [max(matrix.shape) * min(matrix.shape) ** 2 for matrix in matrices]
    owners, loads = [0] * len(costs), [0] * processes
    for number in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


class Muon(torch.optim.Optimizer):
    """Groups with `"muon": True` take orthogonal steps, the others AdamW's.

    Args:
        groups: Parameter groups with `lr` and `weight_decay`; those of Muon hold parameters of two or more dimensions,
            which count as (first, all the rest).
        betas: AdamW's; the first is Muon's momentum too.
        precision: In which matrices are made orthogonal; all else stays in the weights' own.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.95, 0.98),
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.precision = precision
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "betas": betas, "eps": 1e-8, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # as the Trainer calls
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not moving:
                continue
            direct = self._orthogonal if group["muon"] else self._adam
            for parameter, direction in zip(moving, direct(moving, group), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _orthogonal(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Nesterov momentum, made orthogonal."""
        momenta = [self._momentum(parameter, group["betas"][0]).flatten(1) for parameter in parameters]
        return [
            (direction * max(direction.shape) ** 0.5).view_as(parameter)
            for parameter, direction in zip(parameters, orthogonalise_all(momenta, self.precision), strict=True)
        ]

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        mean = state["mean"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, mean, momentum)

    def _adam(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return [self._adam_direction(parameter, group) for parameter in parameters]

    def _adam_direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] = step = state["step"] + 1
        mean, square = state["mean"].lerp_(gradient, 1 - beta1), state["square"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return mean / (1 - beta1**step) / scale
