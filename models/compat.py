"""Everything that depends on transformers' internals, in one place. Checked on 5.14 and 5.23.

What moves between versions: the loader's conversion rules (`conversion_mapping`, `core_model_loading`), the type of
`_keys_to_ignore_on_load_unexpected` (list or set), how many arguments `update_weight_conversions` takes, and which
flags the experts decorator sets on a module (read them with a default).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    ExpertsInterface,
    grouped_mm_experts_forward,
)

__all__ = [
    "KeyResolver",
    "ResolvedKey",
    "cast_as_built",
    "experts_implementations",
    "grouped_mm_experts_forward",
    "ignore_unexpected_keys",
    "is_dispatched_experts",
    "natural_order",
    "register_experts_function",
    "restore_experts_implementations",
]


@dataclass(frozen=True, slots=True)
class ResolvedKey:
    """Where a checkpoint key goes: `target` parameter; for a converted one its operations and this key's pattern."""

    target: str
    pattern: str | None = None
    patterns: tuple[str, ...] = ()
    operations: tuple[Any, ...] = ()

    @property
    def operation_names(self) -> tuple[str, ...]:
        """Class names of the loader's operations, in order."""
        return tuple(type(operation).__name__ for operation in self.operations)


class KeyResolver:
    """Renames checkpoint keys to parameter names exactly as `from_pretrained` does for `model`.

    Make it while the skeleton still has its expert parameters: whether the base model's prefix is added or removed
    depends on the names that the model has.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._names = model.state_dict()

    def __call__(self, key: str) -> ResolvedKey:
        target, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._names)
        if target not in self._names and key in self._names:
            target, pattern = key, None
        if pattern is None:
            return ResolvedKey(target)
        converter = self._by_pattern[pattern]
        return ResolvedKey(target, pattern, tuple(converter.source_patterns), tuple(converter.operations))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted as the loader sorts them: experts.2 before experts.10."""
    return sorted(names, key=dot_natural_key)


def is_dispatched_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module through its experts interface (`@use_experts_implementation`)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def register_experts_function(name: str, function: Callable[..., Any]) -> None:
    """Make `function` selectable as an experts implementation; harmless when done twice."""
    if name not in ALL_EXPERTS_FUNCTIONS:
        ExpertsInterface.register(name, function)


def experts_implementations(model: PreTrainedModel) -> Mapping[int, tuple[Any, str | None]]:
    """The experts implementation of every config in the model, to be given to `restore_experts_implementations`."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    return {key: (config, config._experts_implementation) for key, config in configs.items()}


def restore_experts_implementations(saved: Mapping[int, tuple[Any, str | None]]) -> None:
    """Undo `set_experts_implementation` on the configs that `experts_implementations` returned."""
    for config, implementation in saved.values():
        config._experts_implementation_internal = implementation


def ignore_unexpected_keys(model: PreTrainedModel, modules: Sequence[str]) -> Callable[[], None]:
    """Keep the load report from listing the keys of `modules` as unexpected; returns the undo.

    Only these modules' names are added: the multi-token-prediction loader builds its own key list from the same
    attribute.
    """
    before = model._keys_to_ignore_on_load_unexpected
    had = "_keys_to_ignore_on_load_unexpected" in model.__dict__
    patterns = [re.escape(name) + r"\." for name in modules]
    kind = list if before is None else type(before)
    model._keys_to_ignore_on_load_unexpected = kind([*(before or []), *patterns])

    def undo() -> None:
        if had:
            model._keys_to_ignore_on_load_unexpected = before
        else:
            model.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)

    return undo


def cast_as_built(model: PreTrainedModel, built: Mapping[str, torch.dtype]) -> None:
    """Bring parameters to the dtypes they were built in, by name.

    Beside a quantizer 5.14 leaves a tensor whose key was renamed in the checkpoint's dtype (a Mixtral router, for one).
    What the model keeps in f32 stays.
    """
    kept = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, parameter in model.named_parameters():
        dtype = built.get(name, parameter.dtype)
        if dtype != parameter.dtype and parameter.is_floating_point() and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
