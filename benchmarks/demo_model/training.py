"""One training run: the recipe, the losses, a step, and a checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.demo_model.batches import Ints
from benchmarks.demo_model.muon import Muon
from benchmarks.demo_model.neighbours import Neighbours


@dataclass(frozen=True, slots=True)
class Recipe:
    seed: int = 0
    tokens_per_step: int = 4096
    window: int = 256
    long_window: int = 1024  # the last part of training sees the context the config promises
    long_from: float = 0.8
    chat_share: float = 0.125
    lr: float = 4e-3
    warm_up_steps: int = 100
    weight_decay: float = 0.1
    aux_weight: float = 0.05  # on the mean over layers: 0.008 per layer
    clip: float = 1.0

    def next_lr(self, last: float, progress: float) -> float:
        """A straight line to zero, approached from below at the pace of the warm-up.

        A run that goes on with a larger budget finds itself far below its line and warms up again.
        """
        line = self.lr * max(0.0, 1.0 - progress)
        return min(last + self.lr / self.warm_up_steps, line)


def losses(model: Any, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy, and the load-balancing loss averaged over layers (1 when balanced).

    transformers' own balancing loss adds the layers up before it compares experts, so that a
    layer may collapse as long as another makes up for it; here each layer answers for itself.
    """
    output = model.model(inputs, use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state).float()  # [B, T, V]
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    experts, chosen = model.config.num_experts, model.config.num_experts_per_tok
    balance = torch.zeros(())
    for router_logits in output.router_logits:  # [B * T, E]
        probabilities = router_logits.float().softmax(-1)
        picks = F.one_hot(probabilities.topk(chosen, -1).indices, experts).float()
        share = picks.mean((0, 1))  # [E], sums to 1
        balance = balance + experts * (share * probabilities.mean(0)).sum()
    return entropy, balance / len(output.router_logits)


@torch.no_grad()
def held_out_loss(model: Any, stream: Ints, windows: int, size: int) -> float:
    """Mean loss on evenly spaced windows: a quick look; evaluate.py reads every token."""
    starts = np.linspace(0, len(stream) - size - 1, windows).astype(int)
    tokens = torch.from_numpy(np.stack([stream[start : start + size + 1] for start in starts]))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        total = [losses(model, part[:, :-1], part[:, 1:])[0].item() for part in tokens.split(8)]  # type: ignore[no-untyped-call]
    model.train()
    return sum(total) / len(total)


class Training:
    """Model, optimisers, and how far they are: what a checkpoint holds."""

    def __init__(self, model: Any, recipe: Recipe, compiled: bool) -> None:
        self.model = model
        self.recipe = recipe
        self.optimizers = optimizers(model, recipe)
        self.steps_done = 0
        self.seconds_used = 0.0
        self._neighbours = Neighbours()
        # compiled loops ask for the number of threads when they run
        options: Any = {"cpp.dynamic_threads": True}
        self._losses = torch.compile(losses, dynamic=False, options=options) if compiled else losses

    def step(self, inputs: Tensor, targets: Tensor, lr: float) -> Tensor:
        """Learn from one batch; the cross entropy and the balance it had before."""
        torch.set_num_threads(self._neighbours.free_threads())
        with torch.autocast("cpu", torch.bfloat16):
            entropy, balance = self._losses(self.model, inputs, targets)
        objective = entropy + self.recipe.aux_weight * balance
        objective.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.steps_done += 1
        return torch.stack([entropy.detach(), balance.detach()])

    @property
    def lr(self) -> float:
        """The learning rate of the last step, 0 before the first; a checkpoint keeps it."""
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def save(self, path: Path) -> None:
        beside = path.with_suffix(".tmp")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.steps_done,
            "spent": self.seconds_used,
        }
        torch.save(state, beside)
        os.replace(beside, path)

    def load(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps_done, self.seconds_used = state["step"], state["spent"]


def optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW for embedding, routers and norms."""
    matrices, tables, norms = [], [], []
    for name, param in model.named_parameters():
        if param.ndim < 2:
            norms.append(param)
        elif "embed" in name or "mlp.gate." in name:
            tables.append(param)
        else:
            matrices.append(param)
    groups = [
        {"params": tables, "weight_decay": recipe.weight_decay / 4},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=0.0, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True),
    ]
