"""Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982, so that AdamW's learning rate and weight decay
fit) takes the momentum of a matrix and makes it orthogonal by five Newton-Schulz steps. Matrices of one shape are
treated together: a handful of launches a step instead of a thousand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@torch.no_grad()
def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: (n, rows, cols) -> the same shape, singular values near 1."""
    a, b, c = _COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """`matrices` (2-D) learn by Muon, `others` by AdamW at `share` of its rate and without weight decay.

    A group's "share" is the factor on the learning rate that a schedule must keep."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        lr: float,
        share: float = 0.4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
    ):
        groups = [
            {"params": list(matrices), "muon": True, "share": 1.0, "lr": lr, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "share": share, "lr": lr * share, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adam)(parameters, group)

    def _muon(self, parameters: list[nn.Parameter], group: dict) -> None:
        grads = [p.grad for p in parameters]
        kept = [self._kept(p, "momentum") for p in parameters]
        torch._foreach_lerp_(kept, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, kept, group["momentum"])
        shapes: dict[torch.Size, list[int]] = defaultdict(list)
        for i, parameter in enumerate(parameters):
            shapes[parameter.shape].append(i)
        for shape, rows in shapes.items():
            updates = orthogonalised(torch.stack([ahead[i] for i in rows])) * (0.2 * max(shape) ** 0.5)
            torch._foreach_add_([parameters[i] for i in rows], list(updates.unbind(0)), alpha=-group["lr"])

    def _adam(self, parameters: list[nn.Parameter], group: dict) -> None:
        beta1, beta2 = group["betas"]
        grads = [p.grad for p in parameters]
        means, squares = ([self._kept(p, name) for p in parameters] for name in ("mean", "square"))
        counts = [self._count(p) for p in parameters]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        count = counts[0]
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, (1 - beta2**count) ** 0.5)
        torch._foreach_add_(scale, 1e-8)
        torch._foreach_addcdiv_(parameters, means, scale, -group["lr"] / (1 - beta1**count))

    def _kept(self, parameter: nn.Parameter, name: str) -> Tensor:
        if name not in self.state[parameter]:
            self.state[parameter][name] = torch.zeros_like(parameter)
        return self.state[parameter][name]

    def _count(self, parameter: nn.Parameter) -> float:
        """Steps done, kept as a CPU tensor so that it travels with the checkpoint."""
        state = self.state[parameter]
        state["step"] = state.get("step", torch.zeros((), device="cpu")).cpu() + 1
        return float(state["step"])
