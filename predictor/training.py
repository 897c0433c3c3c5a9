"""Training of the learned predictor, source by source, on a trace's training sequences.

The teacher is the router: its scores of a token say more than which experts it chose (how near the others came), so the
loss is the cross-entropy between softmax(scores) and softmax(predicted scores), the nearest layer's counting most. In a
share of the rows the token before is made unknown, as in prompts. After every pass the validation sequences are
measured; the best pass is kept, and training stops when two in a row have not been better. A distance that is not
better than gate look-ahead on validation sequences stays gate look-ahead.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moe_offload.predictor.calibration import fit_calibration, margins
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.network import Block, Floats, SourceNetwork, SourceView, corrected, input_size
from moe_offload.predictor.trace import DISTANCES, TRAIN, VALIDATION, Trace

BYTES = 2_200_000  # of a source's network at run time: int8 with scales, the last stage twice in f32
_CHUNK = 1 << 16  # tokens that are assembled at once
_MOST_VALIDATED = 1 << 15
_WEIGHTS = (0.5, 0.3, 0.2)  # of the distances in the loss: the nearest layer is what is copied for most
_MIDDLE = (
    0.15,
    0.9,
)  # of the layers: these have a block more (at the demo's fifth it closed 1.5 points more of the gap)

# (what, rows done, rows in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to train. units: of the networks; None takes as many as fit in `BYTES`. unknown: share of the rows without
    the token before. passes: over the training tokens, at most.
    """

    passes: int = 4
    batch: int = 1024
    rate: float = 2e-3
    decay: float = 1e-2
    unknown: float = 0.2
    units: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 1 or self.batch < 1 or not self.rate > 0 or not 0 <= self.unknown <= 1:
            raise ValueError(f"{self}: passes and batch at least 1, rate above 0, unknown from 0 to 1")


class Trained(NamedTuple):
    """One source. recall: [2, D], of gate look-ahead and of the network, on validation sequences, token by token."""

    network: SourceNetwork
    recall: Floats
    passes: int


def choose_units(experts: int, projected: int, hidden_size: int, block: bool) -> int:
    """The most units whose network fits in `BYTES` at run time."""
    look = (DISTANCES * experts + projected) * hidden_size
    inputs = input_size(experts, projected)
    for units in (1024, 768, 512, 384, 256, 192, 128, 96, 64):
        packed = 1.0625 * (look + 2 * units * inputs + (2 * units * units if block else 0))
        if packed + 2 * 4 * DISTANCES * experts * units <= BYTES:
            return units
    return 64


def has_block(source: int, layers: int) -> bool:
    """Whether a source's network is one of the deeper ones: all but those of the first and the last layers."""
    return _MIDDLE[0] <= (source + 0.5) / layers < _MIDDLE[1]


class _Module(nn.Module):
    """`SourceNetwork` with gradients, behind a standardisation of the inputs."""

    def __init__(self, experts: int, inputs: int, units: int, blocks: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.gate, self.up = nn.Linear(inputs, units), nn.Linear(inputs, units)
        self.inner = nn.ModuleList(nn.Linear(units, units) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(units, units, bias=False) for _ in range(blocks))
        self.out = nn.Linear(units, DISTANCES * experts)
        for last in (self.out, *self.down):
            nn.init.zeros_(last.weight)
        nn.init.zeros_(self.out.bias)
        self.mean, self.deviation = mean, deviation

    def forward(self, inputs: Tensor, look: Tensor) -> Tensor:
        x = (inputs - self.mean) / self.deviation
        g = functional.silu(self.gate(x)) * self.up(x)
        for inner, down in zip(self.inner, self.down, strict=True):
            g = g + down(functional.silu(inner(g)))
        scores: Tensor = look + self.out(g).view(len(x), DISTANCES, self.experts)
        return scores

    def network(self, projection: Floats, offset: Floats) -> SourceNetwork:
        """Its weights, with the standardisation folded in, and no calibration yet."""

        def folded(linear: nn.Linear) -> tuple[Floats, Floats]:
            weight = linear.weight / self.deviation
            return _array(weight), _array(linear.bias - weight @ self.mean)

        gate, gate_bias = folded(self.gate)
        up, up_bias = folded(self.up)
        blocks = tuple(
            Block(_array(inner.weight), _array(inner.bias), _array(down.weight))  # type: ignore[arg-type]
            for inner, down in zip(self.inner, self.down, strict=True)
        )
        ones = np.ones((2, DISTANCES), np.float32)
        return SourceNetwork(
            projection, offset, gate, gate_bias, up, up_bias, blocks,
            _array(self.out.weight).reshape(DISTANCES, self.experts, -1),
            _array(self.out.bias).reshape(DISTANCES, self.experts), ones, np.zeros_like(ones),
        )  # fmt: skip


def train_source(trace: Trace, source: int, settings: Settings, progress: Progress | None = None) -> Trained:
    """Train one source's network.

    Raises TraceError when the trace has no training or no validation sequences.
    """
    training, validation = trace.tokens(trace.in_split(TRAIN)), trace.tokens(trace.in_split(VALIDATION))
    if not len(training) or not len(validation):
        raise TraceError(
            f"the trace has {len(training)} training and {len(validation)} validation tokens: trace more sequences"
        )
    random = np.random.default_rng([settings.seed, source])
    validation = validation[:_MOST_VALIDATED]
    info, view = trace.info, SourceView(trace, source)
    block = has_block(source, info.layers)
    units = settings.units or choose_units(info.experts, info.projected, info.hidden_size, block)
    sample = training if len(training) <= 1 << 14 else random.choice(training, 1 << 14, replace=False)
    inputs = torch.from_numpy(view.known(np.sort(sample), decode=True).inputs())
    mean, deviation = inputs.mean(0), inputs.std(0) + 1e-2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * 1000 + source)
        module = _Module(info.experts, inputs.shape[1], units, int(block), mean, deviation)
    best, at_best, kept, passes = _loss(module, trace, source, view, validation), 0, _copy(module), 0
    total = settings.passes * len(training)
    steps = settings.passes * sum(-(-min(_CHUNK, len(training) - at) // settings.batch)
                                  for at in range(0, len(training), _CHUNK))  # fmt: skip
    optimizer = torch.optim.AdamW(module.parameters(), settings.rate, weight_decay=settings.decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    done = 0
    for number in range(1, settings.passes + 1):
        for batch in _batches(trace, source, view, training, settings, random):
            loss = _cross_entropy(module(batch.inputs, batch.look), batch.target).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += len(batch.look)
            if progress is not None:
                progress(f"training, layer {source + 1} of {info.layers}", source * total + done, info.layers * total)
        passes = number
        now = _loss(module, trace, source, view, validation)
        if now < best:
            best, at_best, kept = now, number, _copy(module)
        elif number - at_best >= 2:
            break
    module.load_state_dict(kept)
    deviations = np.sqrt(np.maximum(trace.variance[source], 1e-12))
    network = module.network(trace.projection[source] / deviations[:, None], trace.offset[source] / deviations)
    return _finish(trace, source, view, network, validation, passes)


class _Batch(NamedTuple):
    inputs: Tensor  # [n, U]
    look: Tensor  # [n, D, E]
    target: Tensor  # [n, layers ahead, E]


def _batches(
    trace: Trace,
    source: int,
    view: SourceView,
    tokens: NDArray[np.int64],
    settings: Settings,
    random: np.random.Generator,
) -> Iterator[_Batch]:
    """All tokens once, in random order: chunks of random tokens, in the file's order while they are read."""
    order = random.permutation(tokens)
    for start in range(0, len(order), _CHUNK):
        chunk = np.sort(order[start : start + _CHUNK])
        known = view.known(chunk, decode=True)
        hide = random.random(len(chunk)) < settings.unknown
        known.before[hide] = 0.0
        known.known[hide] = 0.0
        inputs, look = torch.from_numpy(known.inputs()), torch.from_numpy(known.look)
        target = torch.from_numpy(_target(trace, source, chunk))
        order_in_chunk = torch.from_numpy(random.permutation(len(chunk)))
        for rows in torch.split(order_in_chunk, settings.batch):
            yield _Batch(inputs[rows], look[rows], target[rows])


def _target(trace: Trace, source: int, tokens: NDArray[np.int64]) -> Floats:
    """[n, layers ahead, E] what the routers' scores say, as shares."""
    ahead = range(source, min(source + DISTANCES, trace.info.layers))
    scores = np.stack([trace.scores[layer, tokens].astype(np.float32) for layer in ahead], axis=1)
    return torch.from_numpy(scores).softmax(-1).numpy()


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """[n]"""
    ahead = target.shape[1]
    each = -(target * functional.log_softmax(scores[:, :ahead], -1)).sum(2)
    return each @ torch.tensor(_WEIGHTS[:ahead]) / sum(_WEIGHTS[:ahead])


@torch.no_grad()
def _loss(module: _Module, trace: Trace, source: int, view: SourceView, tokens: NDArray[np.int64]) -> float:
    known = view.known(tokens, decode=True)
    scores = module(torch.from_numpy(known.inputs()), torch.from_numpy(known.look))
    return float(_cross_entropy(scores, torch.from_numpy(_target(trace, source, tokens))).mean())


def _finish(
    trace: Trace, source: int, view: SourceView, network: SourceNetwork, tokens: NDArray[np.int64], passes: int
) -> Trained:
    """Compare with gate look-ahead, and calibrate, on validation tokens."""
    info = trace.info
    ahead = min(DISTANCES, info.layers - source)
    chosen = [trace.chosen(source + each, tokens) for each in range(ahead)]
    known = view.known(tokens, decode=True)
    recall = np.full((2, DISTANCES), np.nan, np.float32)
    scores = corrected(network, known)
    for each in range(ahead):
        recall[0, each] = _recall(known.look[:, each], chosen[each], info.top_k)
        recall[1, each] = _recall(scores[:, each], chosen[each], info.top_k)
        if recall[1, each] < recall[0, each]:
            network.out[each], network.out_bias[each] = 0.0, 0.0
            recall[1, each] = recall[0, each]
    for decode in (False, True):
        scores = corrected(network, view.known(tokens, decode=decode))
        for each in range(ahead):
            fitted = fit_calibration(margins(scores[:, each], info.top_k), chosen[each])
            network.slope[int(decode), each], network.shift[int(decode), each] = fitted.a, fitted.b
    return Trained(network, recall, passes)


def _recall(scores: Floats, chosen: NDArray[np.bool_], top_k: int) -> float:
    best = np.argpartition(-scores, top_k - 1, axis=-1)[:, :top_k]
    return float(np.take_along_axis(chosen, best, axis=-1).mean())


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _array(value: Tensor) -> Floats:
    return np.ascontiguousarray(value.detach().numpy(), np.float32)
