"""Muon, momentum with orthogonal steps, for the matrices inside a network; AdamW for everything else.

On two cores the dense stage reaches the same loss in about two thirds of AdamW's time. torch.optim.Muon always
orthogonalises in bfloat16. A CPU without bfloat16 arithmetic emulates that, and the gain is lost. This optimizer uses
the precision of the stage, and it holds both kinds of parameters, because the Trainer takes one optimizer.

Muon: Keller Jordan et al., 2024. The root mean square of a step is one, as in the first steps of AdamW, so that one
learning rate fits the matrices and the vectors of a part (arXiv 2502.16982, section 2.2, with 1 instead of 0.2).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrix: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """Return the (rows, columns) matrix with singular values near one, by Newton-Schulz iteration in the precision."""
    a, b, c = _QUINTIC
    x = (matrix / (matrix.norm() + 1e-7)).to(precision)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def orthogonalise_all(matrices: Sequence[Tensor], precision: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the orthogonalised matrices; several processes with the same matrices share the work."""
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
    """Return the process of each matrix: the most expensive matrix first, each to the least loaded process."""
    costs = [max(matrix.shape) * min(matrix.shape) ** 2 for matrix in matrices]
    owners, loads = [0] * len(costs), [0] * processes
    for number in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += costs[number]
    return owners


class Muon(torch.optim.Optimizer):
    """Muon for groups with `"muon": True`, AdamW for the others.

    Args:
        groups: Parameter groups with `lr` and `weight_decay`. Parameters of Muon have two or more dimensions, and count
            as matrices of (first dimension, all others).
        betas: The betas of AdamW; the first is also Muon's momentum.
        precision: The precision of orthogonalisation; everything else uses the precision of the weights.
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
            if group["muon"]:
                directions = self._muon_directions(moving, group)
            else:
                directions = [self._adam_direction(parameter, group) for parameter in moving]
            for parameter, direction in zip(moving, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _muon_directions(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Return the orthogonalised Nesterov momentum of each parameter."""
        momenta = []
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["mean"] = torch.zeros_like(parameter)
            mean = state["mean"].lerp_(gradient, 1 - group["betas"][0])
            momenta.append(torch.lerp(gradient, mean, group["betas"][0]).flatten(1))
        return [
            (direction * max(direction.shape) ** 0.5).view_as(parameter)
            for parameter, direction in zip(parameters, orthogonalise_all(momenta, self.precision), strict=True)
        ]

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
