"""How near one model's logits are to a reference's: errors, agreement, divergence, perplexities.

Everything is computed from logits in f32, row by row, and summed in f64; of a text's [T, V] logits only some rows are
looked at at a time. Perplexity is e to the mean loss of the tokens that follow; its change is given with the standard
error that comes from which tokens were scored, both models having scored the same ones.
"""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional

_AT_ONCE = 1 << 23  # logits of a model


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a comparison came to. Shares and changes are in percent; nan where nothing was scored."""

    tokens: int
    scored: int  # those whose next token is known
    max_error: float
    mean_error: float
    spread: float  # standard deviation of the reference's logits, which errors are to be seen beside
    top1: float  # positions where both find the same token most probable
    divergence: float  # mean of KL(reference || model), nats
    max_divergence: float
    reference_perplexity: float
    perplexity: float
    change: float  # of the perplexity
    change_error: float  # standard error of that

    @property
    def is_finite(self) -> bool:
        """Whether the model's logits are numbers everywhere."""
        return math.isfinite(self.max_error) and math.isfinite(self.perplexity)


@dataclass(slots=True)
class Comparison:
    """Sums over the positions that were added."""

    tokens: int = 0
    _logits: int = 0
    _same: int = 0
    _max_error: float = 0.0
    _error: float = 0.0
    _sum: float = 0.0
    _squares: float = 0.0
    _divergence: float = 0.0
    _max_divergence: float = 0.0
    _losses: list[torch.Tensor] = field(default_factory=list)  # [2, n] each: the reference's, the model's

    def add(self, reference: torch.Tensor, model: torch.Tensor, following: torch.Tensor) -> None:
        """Logits [T, V] of the same positions, and the tokens that follow them, [T] or one less.

        Raises ValueError for other shapes.
        """
        if reference.shape != model.shape or len(reference) - len(following) not in (0, 1):
            raise ValueError(
                f"logits are {list(reference.shape)} and {list(model.shape)}, with {len(following)} following tokens"
            )
        step = max(1, _AT_ONCE // reference.shape[-1])
        for first in range(0, len(reference), step):
            rows = slice(first, first + step)
            self._add(reference[rows].float(), model[rows].float(), following[rows])

    def merge(self, other: "Comparison") -> None:
        """Add what another has seen."""
        self.tokens += other.tokens
        self._logits += other._logits
        self._same += other._same
        self._max_error = _greater(self._max_error, other._max_error)
        self._error += other._error
        self._sum += other._sum
        self._squares += other._squares
        self._divergence += other._divergence
        self._max_divergence = _greater(self._max_divergence, other._max_divergence)
        self._losses += other._losses

    def result(self) -> Agreement:
        """The figures. Raises ValueError when nothing was added."""
        if not self.tokens:
            raise ValueError("nothing was compared")
        losses = torch.cat(self._losses, dim=1)
        scored = losses.shape[1]
        base, changed = (math.exp(min(each, 700.0)) if scored else math.nan for each in losses.mean(dim=1).tolist())
        differences = losses[1] - losses[0]
        error = float(differences.std()) / math.sqrt(scored) if scored > 1 else math.nan
        mean = self._sum / self._logits
        return Agreement(
            self.tokens, scored, self._max_error, self._error / self._logits,
            math.sqrt(max(self._squares / self._logits - mean * mean, 0.0)),
            100 * self._same / self.tokens, self._divergence / self.tokens, self._max_divergence,
            base, changed, 100 * math.expm1(min(float(differences.mean()), 700.0)) if scored else math.nan,
            100 * changed / base * error,
        )  # fmt: skip

    def _add(self, reference: torch.Tensor, model: torch.Tensor, following: torch.Tensor) -> None:
        # what a model rules out is -inf on both sides, and no number once subtracted
        error = torch.where(reference == model, 0.0, (reference - model).abs())
        finite = reference[reference.isfinite()].double()
        self.tokens += len(reference)
        self._logits += len(finite)
        self._same += int((reference.argmax(-1) == model.argmax(-1)).sum())
        self._max_error = _greater(self._max_error, float(error.max()))
        self._error += float(error.double().sum())
        self._sum += float(finite.sum())
        self._squares += float(finite.square().sum())
        logs, others = functional.log_softmax(reference, -1), functional.log_softmax(model, -1)
        terms = torch.where(logs.isneginf(), 0.0, logs.exp() * (logs - others))
        divergence = terms.double().sum(-1).clamp_min(0)  # below 0 by rounding only
        self._divergence += float(divergence.sum())
        self._max_divergence = _greater(self._max_divergence, float(divergence.max()))
        at = following[:, None]
        self._losses.append(-torch.stack([each[: len(at)].gather(1, at)[:, 0] for each in (logs, others)]).double())


def _greater(one: float, other: float) -> float:
    """The greater one; nan where either is, which `max` may lose."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)
