"""Muon for the matrices, AdamW for the rest (not compared with AdamW alone on this model).

A matrix's step is the orthogonal factor of its momentum, found by five Newton-Schulz rounds, so
that every direction of the matrix learns at the same pace. Experts are stacks of matrices and are
treated one by one in a batch. The scale 0.2 * sqrt(longer side) gives steps the size of AdamW's,
hence one learning rate serves both.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

ROUNDS = 5
A, B, C = 3.4445, -4.7750, 2.0315  # a quintic that takes singular values in (0, 1] near 1


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each matrix of a stack, roughly.

    matrices: [N, R, C]
    """
    x: Tensor = matrices.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT.float() if transposed else x.float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made orthogonal; `parts` cuts rows of a fused projection into matrices."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum: Tensor = state["momentum"]
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = param.grad.lerp(momentum, group["momentum"])
                matrices = update.reshape(-1, *update.shape[-2:])  # [N, R, C]
                if update.ndim == 3 and update.shape[-2] < update.shape[-1]:
                    # gate and up of an expert lie one under the other
                    matrices = matrices.reshape(-1, update.shape[-2] // 2, update.shape[-1])
                scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(orthogonal(matrices).reshape(param.shape), alpha=-group["lr"] * scale)
