"""Everything that depends on transformers' internals, in one place. Checked on 5.14 and 5.23.

What moves between versions: the loader's conversion rules (`conversion_mapping`, `core_model_loading`), the type of
`_keys_to_ignore_on_load_unexpected` (list or set), how many arguments `update_weight_conversions` takes, and which
flags the experts decorator sets on a module (read them with a default).
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "KeyResolver",
    "ResolvedKey",
    "asks_for_sdpa_by_name",
    "attention_function",
    "caches_latents",
    "cast_as_built",
    "experts_implementations",
    "grouped_mm_experts_forward",
    "ignore_unexpected_keys",
    "is_dispatched_attention",
    "is_dispatched_experts",
    "keeps_what_the_cache_returns",
    "natural_order",
    "only_attends_to_what_it_expands",
    "register_attention_function",
    "register_experts_function",
    "restore_experts_implementations",
    "set_attention_implementation",
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


# Attention


def register_attention_function(name: str, function: Callable[..., Any], mask_of: str) -> None:
    """Make `function` selectable as an attention implementation, with the masks that `mask_of` gets.

    Without masks of its own an implementation is handed none, and padding is attended to, without an error.
    """
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[mask_of])


def is_dispatched_attention(module: nn.Module) -> bool:
    """Whether a module of transformers' own calls the attention function that its config names."""
    if not type(module).__module__.startswith("transformers.models."):
        return False
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """What a dispatched attention calls under an implementation's name: its file may have one of its own."""
    names = inspect.unwrap(type(module).forward).__globals__
    function: Callable[..., Any] = names["ALL_ATTENTION_FUNCTIONS"].get_interface(
        implementation, names["eager_attention_forward"]
    )
    return function


def set_attention_implementation(config: Any, name: str) -> None:
    """Name the attention function of the modules with this config, and of no others."""
    config._attn_implementation_internal = name


def keeps_what_the_cache_returns(attention: type[nn.Module]) -> str:
    """Why a dispatched attention needs what its cache returns for itself; empty where it only hands it on.

    MLA makes keys and values of the latents that the cache holds, with its own weights, and others pass them on to
    later layers: both compute with them where the module is, wherever the cache is. Read from the source of `forward`,
    since names tell nothing.
    """
    nodes = _nodes_of_forward(attention)
    if nodes is None:
        return "the source of its forward is not there to be read"
    made = _made_by(nodes, lambda call: call.endswith(".update"))
    if made is None:
        return "it does not use its cache in the usual way"
    return (
        ""
        if _only_attended_to(nodes, made)
        else "it computes with what its cache returns (MLA, keys that layers share)"
    )


def caches_latents(attention: type[nn.Module]) -> bool:
    """Whether an attention caches latents, of which it makes keys and values of all heads at every call.

    In 5.14 it caches these keys and values.
    """
    return hasattr(attention, "expand_kv")


def only_attends_to_what_it_expands(attention: type[nn.Module]) -> bool:
    """Whether an attention caches latents, and does nothing with the keys and values that its `expand_kv` makes of them
    but to hand them to the attention function. False for everything else, and without its source.
    """
    if not caches_latents(attention) or not attention.__module__.startswith("transformers.models."):
        return False
    nodes = _nodes_of_forward(attention) or []
    made = _made_by(nodes, lambda call: call == "self.expand_kv")
    return made is not None and _only_attended_to(nodes, made)


def _nodes_of_forward(attention: type[nn.Module]) -> list[ast.AST] | None:
    """Of its source, decorators looked through; None where there is none."""
    try:
        return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(attention.forward))))))
    except (OSError, SyntaxError):
        return None


def _made_by(nodes: list[ast.AST], is_it: Callable[[str], bool]) -> ast.Assign | None:
    """The one assignment of a tuple from such a call, in a forward with one call of the attention function."""
    made = [n for n in nodes if isinstance(n, ast.Assign) and is_it(_called(n.value))]
    usual = len(made) == 1 and len(_attention_calls(nodes)) == 1 and isinstance(made[0].targets[0], ast.Tuple)
    return made[0] if usual else None


def _only_attended_to(nodes: list[ast.AST], made: ast.Assign) -> bool:
    """Whether both names that are assigned go to the attention function as keys and values, and nowhere else."""
    (call,), (target,) = _attention_calls(nodes), made.targets
    assert isinstance(target, ast.Tuple)
    names = [ast.unparse(each) for each in target.elts]
    later = [n for n in nodes if isinstance(n, ast.Name) and n.id in names and n.lineno > (made.end_lineno or 0)]
    return names == [ast.unparse(argument) for argument in call.args[2:4]] and len(later) == 2


def _attention_calls(nodes: list[ast.AST]) -> list[ast.Call]:
    return [n for n in nodes if isinstance(n, ast.Call) and _called(n) == "attention_interface"]


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def asks_for_sdpa_by_name(module: type[nn.Module]) -> bool:
    """Whether a class compares the implementation's name: under another one it would compute differently."""
    codes = [inspect.unwrap(each).__code__ for each in vars(module).values() if inspect.isfunction(each)]
    constants = [constant for code in codes for constant in code.co_consts]
    return any(each == "sdpa" or (isinstance(each, tuple) and "sdpa" in each) for each in constants)
