"""A model's routers as matrices over what its experts see, and the same matrices for looking layers ahead.

A router scores experts by a linear of its layer's experts input x, which lies behind the layer's norm. Which tensors
that takes is found by trying: the block is called with random inputs, and the form whose K largest scores are the
experts it chose is the router's. Its norm is the module whose output the experts get; what it multiplies and adds
is found by putting vectors through it.

Looking ahead from layer l's experts input to layer t's router supposes that the residual stream hardly changes: norm l
is undone and norm t applied, both folded into the rows.

Not modelled: the choice of groups of experts (DeepSeek V3 and others), which comes before the choice of experts; the
scores are those within groups. Routers that are no linear of what the experts see are refused with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from moe_offload.models.errors import UnsupportedModelError
from moe_offload.predictor.trace import DISTANCES, SHARPNESS, Select

Floats = NDArray[np.float32]

_PROBES = 256  # random inputs
_AGREEMENT = 0.25  # of the chosen experts, above what chance would find: groups may hide the others
_TINY = 1e-3  # of the median: factors of a norm that are not undone


@dataclass(frozen=True, slots=True)
class RouterRows:
    """One layer's router. The K largest of `scores` are its choice, before groups.

    select: "linear": W x + b; "sigmoid" or "softmax": SHARPNESS times that function of it plus a selection bias.
    """

    weight: Floats  # [E, H]
    bias: Floats | None  # [E]
    select: Select
    selection_bias: Floats | None  # [E]

    def scores(self, x: Floats) -> Floats:
        """[T, E] of the experts' input [T, H]."""
        logits = x @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        return selected(logits, self.select, self.selection_bias)


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The routers of layers s, s + 1, s + 2 as seen from source s; zeros beyond the last layer.

    Source 0 is the token's embedding divided by its root mean square, source s the experts' input of layer s - 1.
    """

    rows: NDArray[np.float32]  # [D, E, H]
    bias: Floats  # [D, E]
    select: Select
    selection_bias: Floats | None  # [D, E]

    def look(self, state: Floats) -> Floats:
        """[T, D, E] scores of [T, H]."""
        distances, experts, size = self.rows.shape
        logits = (state @ self.rows.reshape(-1, size).T).reshape(-1, distances, experts) + self.bias
        return selected(logits, self.select, self.selection_bias)


class Routers(NamedTuple):
    """All layers' routers."""

    layers: tuple[RouterRows, ...]
    sources: tuple[SourceRows, ...]


def selected(logits: Floats, select: Select, selection_bias: Floats | None) -> Floats:
    """What the K largest are taken of."""
    if select == "linear":
        return logits
    if select == "sigmoid":
        bounded = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    else:
        bounded = np.exp(logits - logits.max(axis=-1, keepdims=True))
        bounded /= bounded.sum(axis=-1, keepdims=True)
    if selection_bias is not None:
        bounded = bounded + selection_bias
    return np.asarray(SHARPNESS * bounded, np.float32)


def normalised(embedding: Floats) -> Floats:
    """What source 0 is: rows [T, H] divided by their root mean square."""
    square = np.square(embedding, dtype=np.float64).mean(axis=1, keepdims=True)
    return np.asarray(embedding / np.sqrt(square + 1e-24), np.float32)


def look_rows(model: PreTrainedModel) -> list[SourceRows]:
    """What looks ahead from each source. Raises as `read_routers`."""
    return list(read_routers(model).sources)


def read_routers(model: PreTrainedModel) -> Routers:
    """The routers of a model that `moe_offload.load` made. A few tokens go through it.

    Raises UnsupportedModelError, with the reason, when they are not of a kind that can be looked ahead with.
    """
    engine: Any = model.offload
    paths = [layer.path for layer in engine.spec.layers]
    counts = [(layer.num_experts, layer.top_k, layer.hidden_size) for layer in engine.spec.layers]
    if len(set(counts)) != 1:
        raise UnsupportedModelError("the layers differ in experts or width: their routing cannot be traced")
    experts, _, size = counts[0]
    with torch.inference_mode():
        probes = [_probe(model, path, size) for path in paths]
        candidates = [_candidates(model, path, experts, size) for path in paths]
        layers = _best(paths, probes, candidates, experts)
        norms = _norms(model, paths, size)
    sources = [_source(source, layers, norms) for source in range(len(layers))]
    return Routers(tuple(layers), tuple(sources))


class _Stop(Exception):
    """The experts were reached."""


class _Probe(NamedTuple):
    hidden: Floats  # [T, H] what the experts got
    chosen: NDArray[np.int64]  # [T, K]


def experts_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, indices and weights of a call of an experts module."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    values = [*args, *(kwargs[name] for name in names[len(args) :])]
    return values[0], values[1], values[2]


def _probe(model: PreTrainedModel, path: str, size: int) -> _Probe:
    """What a block makes of random inputs."""
    block, module = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    parameter = next(iter(block.parameters()), None)
    dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.float32
    device = parameter.device if parameter is not None else torch.device("cpu")
    x = torch.randn(1, _PROBES, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    found: list[_Probe] = []

    def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, index, _weights = experts_call(args, kwargs)
        found.append(_Probe(as_floats(hidden), index.cpu().numpy().astype(np.int64)))
        raise _Stop

    with _hooks([module.register_forward_pre_hook(seen, with_kwargs=True)]):
        try:
            block(x)
        except _Stop:
            pass
        except Exception as error:  # modules raise whatever they like
            raise UnsupportedModelError(
                f"the router of {path} cannot be read: its block does not run by itself ({type(error).__name__})"
            ) from error
    if not found or found[0].hidden.shape != (_PROBES, size):
        raise UnsupportedModelError(f"the router of {path} cannot be read: its experts do not get the block's input")
    return found[0]


def _candidates(model: PreTrainedModel, path: str, experts: int, size: int) -> list[RouterRows]:
    """Every way in which the tensors beside the experts could be a router, the simplest first."""
    block = model.get_submodule(path.rpartition(".")[0])
    matrices, vectors = [], []
    for name, module in block.named_modules():
        if f"{name}.".startswith(f"{path.rpartition('.')[2]}."):  # the experts themselves
            continue
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        if "weight" not in own and getattr(module, "out_features", None) == experts:
            own["weight"] = module.weight  # a packed linear's
        for tensor in own.values():
            if tensor is not None and tuple(tensor.shape) == (experts, size):
                matrices.append(as_floats(tensor))
            elif (
                tensor is not None and tensor.is_floating_point() and tuple(tensor.shape) in ((experts,), (1, experts))
            ):
                vectors.append(as_floats(tensor).reshape(experts))
    found = []
    for weight in matrices:
        found.append(RouterRows(weight, None, "linear", None))
        found += [RouterRows(weight, vector, "linear", None) for vector in vectors]
        for select in ("sigmoid", "softmax"):
            found += [RouterRows(weight, None, select, vector) for vector in vectors]
            found += [RouterRows(weight, bias, select, vector) for bias, vector in permutations(vectors, 2)]
    return found


def _best(
    paths: Sequence[str], probes: Sequence[_Probe], candidates: Sequence[list[RouterRows]], experts: int
) -> list[RouterRows]:
    """The candidate that finds most of what all layers chose."""
    count = min(map(len, candidates))
    if not count or any(len(each) != count for each in candidates):
        raise UnsupportedModelError(f"the router of {paths[0]} is no linear of what its experts get")
    agreement = np.zeros((count, len(paths)))
    for layer, (probe, forms) in enumerate(zip(probes, candidates, strict=True)):
        for number, form in enumerate(forms):
            agreement[number, layer] = _agreement(form.scores(probe.hidden), probe.chosen)
    best = int(agreement.mean(axis=1).argmax())  # the first of equals
    top_k = probes[0].chosen.shape[1]
    chance = top_k / experts
    worst = int(agreement[best].argmin())
    if agreement[best, worst] < chance + _AGREEMENT * (1 - chance):
        raise UnsupportedModelError(
            f"the router of {paths[worst]} is not understood: at best {agreement[best, worst]:.0%} of what it chooses "
            "is found"
        )
    return [forms[best] for forms in candidates]


def _agreement(scores: Floats, index: NDArray[np.int64]) -> float:
    """The share of the chosen experts that are among the K best."""
    top_k = index.shape[1]
    inside = (index >= 0) & (index < scores.shape[1])
    chosen = np.take_along_axis(scores, np.where(inside, index, 0), axis=1)
    border = np.partition(scores, -top_k, axis=1)[:, -top_k, None]
    return float(((chosen >= border) & inside).mean())


class _Norm(NamedTuple):
    """What a norm does to normalised x: x * factor + shift."""

    factor: Floats  # [H]
    shift: Floats
    centred: bool


def _norms(model: PreTrainedModel, paths: Sequence[str], size: int) -> list[_Norm | None]:
    """The norm in front of each layer's experts; None where the experts get something else than a norm's output."""
    outputs: dict[nn.Module, torch.Tensor] = {}
    found: dict[str, nn.Module] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs[module] = output

    def arrived(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = experts_call(args, kwargs)[0]
            for module, output in reversed(outputs.items()):
                if output.numel() == hidden.numel() and torch.equal(output.reshape(hidden.shape), hidden):
                    found[path] = module
                    break
            outputs.clear()

        return compare

    handles = [module.register_forward_hook(record) for module in model.modules() if _may_be_norm(module, size)]
    handles += [model.get_submodule(path).register_forward_pre_hook(arrived(path), with_kwargs=True) for path in paths]
    with _hooks(handles):
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
        model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return [_read_norm(found[path], size) if path in found else None for path in paths]


def _may_be_norm(module: nn.Module, size: int) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not module._modules and all(tuple(each.shape) == (size,) for each in parameters)


def _read_norm(module: nn.Module, size: int) -> _Norm | None:
    """A norm's factors, by vectors that it normalises to +1 and -1; None when it is no such norm."""
    like = next(iter(module.parameters()))
    signs = torch.ones(size)
    signs[::2] = -1

    def put(x: torch.Tensor) -> Floats:
        return as_floats(module(x.to(like.device, like.dtype).reshape(1, 1, size))).reshape(size)

    large = 64 * signs  # the norm's epsilon vanishes beside it
    plus, minus = put(large), put(-large)
    shift, factor = (plus + minus) / 2, (plus - minus) / 2 * signs.numpy()
    ramp = torch.linspace(-64, 64, size)
    centred = bool(np.abs(put(ramp + 64) - put(ramp)).max() < 0.05 * max(np.abs(put(ramp)).max(), 1e-9))
    x = ramp.to(like.dtype).float().numpy()
    expected = x / np.sqrt(np.square(x).mean()) * factor + shift
    scale = np.abs(expected).max()
    if np.abs(put(ramp) - expected).max() > 0.02 * scale:
        return None
    return _Norm(factor.astype(np.float32), shift.astype(np.float32), centred)


def _source(source: int, layers: Sequence[RouterRows], norms: Sequence[_Norm | None]) -> SourceRows:
    experts, size = layers[0].weight.shape
    rows = np.zeros((DISTANCES, experts, size), np.float32)
    bias = np.zeros((DISTANCES, experts), np.float32)
    biased = layers[0].selection_bias is not None
    selection = np.zeros((DISTANCES, experts), np.float32) if biased else None
    for distance, target in enumerate(range(source, min(source + DISTANCES, len(layers)))):
        router = layers[target]
        rows[distance], bias[distance] = _folded(router, norms[source - 1] if source else None, norms[target], source)
        if selection is not None:
            selection[distance] = router.selection_bias
    return SourceRows(rows, bias, layers[0].select, selection)


def _folded(router: RouterRows, behind: _Norm | None, before: _Norm | None, source: int) -> tuple[Floats, Floats]:
    """Rows and bias of a router in terms of a source, which lies behind another norm, or is the embedding."""
    bias = np.zeros(len(router.weight), np.float32) if router.bias is None else router.bias
    if before is None or (source and behind is None):
        return router.weight, bias
    if behind is None:
        rows = router.weight * before.factor
        rows = rows - rows.mean(axis=1, keepdims=True) if before.centred else rows
        return rows, bias + router.weight @ before.shift
    kept = np.abs(behind.factor) < _TINY * np.median(np.abs(behind.factor))
    ratio = np.where(kept, 1, before.factor / np.where(kept, 1, behind.factor)).astype(np.float32)
    return router.weight * ratio, bias + router.weight @ (before.shift - ratio * behind.shift)


def as_floats(tensor: torch.Tensor) -> Floats:
    """A copy in f32, in host memory."""
    copy: Floats = tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
    return copy


@contextmanager
def _hooks(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
