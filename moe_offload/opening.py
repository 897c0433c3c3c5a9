"""From the command line's options to a loaded model: the cheapest mistakes are found first."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from moe_offload import terminal
from moe_offload.model_folder import find_model
from moe_offload.models.errors import OptionError
from moe_offload.options import Activations, Dense, Options, Progress, Weights
from moe_offload.progress import BYTES, Activity

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"auto": "auto", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how to run it. Raises OptionError for values out of bounds."""

    name: str
    weights: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    memory_limit: int | None = None
    attn_implementation: str | None = None
    revision: str | None = None
    verbose: bool = False
    show_progress: bool = True
    activations: str = "auto"
    pack_dir: Path | None = None
    dense: str = "auto"
    device: str = "auto"
    gpu_memory: int | None = None
    ram: int | None = None
    policy: str = "ours"
    predictor: str = "auto"
    adapt: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"--threads {self.threads} is out of bounds: it must be at least 1")
        for name, known in (("weights", Weights), ("activations", Activations), ("dense", Dense)):
            if getattr(self, name) not in get_args(known):
                raise OptionError(f"--{name} {getattr(self, name)} is not one of {', '.join(get_args(known))}")
        self.engine_options()

    def engine_options(self) -> Options:
        """Those of them that are the engine's."""
        return Options(
            cast(Weights, self.weights), self.threads, self.memory_limit,
            activations=cast(Activations, self.activations), pack_dir=self.pack_dir, dense=cast(Dense, self.dense),
            device=self.device, gpu_memory=self.gpu_memory, ram=self.ram, policy=self.policy,
            predictor=self.predictor, adapt=self.adapt,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model whose configuration and tokenizer are read, and whose weights are not."""

    options: ModelOptions
    folder: Path
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"

    def load(self) -> tuple["PreTrainedModel", float]:
        """The model, and the seconds it took."""
        import torch
        from transformers.utils import logging

        from moe_offload.loading import load

        options = self.options
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        started = time.perf_counter()
        with Activity(f"loading {options.name}", enabled=options.show_progress) as activity:

            def on_tensors(factory: Any, args: Any, kwargs: Any) -> Any:
                return _Counted(*args, activity=activity, **kwargs)

            hook = logging.set_tqdm_hook(on_tensors)
            try:
                model = load(
                    self.folder,
                    weights=cast(Weights, options.weights),
                    threads=options.threads,
                    memory_limit=options.memory_limit,
                    dtype=DTYPES[options.dtype],
                    attn_implementation=options.attn_implementation,
                    activations=cast(Activations, options.activations),
                    pack_dir=options.pack_dir,
                    dense=cast(Dense, options.dense),
                    device=options.device,
                    gpu_memory=options.gpu_memory,
                    ram=options.ram,
                    policy=options.policy,
                    predictor=options.predictor,
                    adapt=options.adapt,
                    progress=showing(activity),
                )
            finally:
                logging.set_tqdm_hook(hook)
        return model, time.perf_counter() - started


def showing(activity: Activity) -> Progress:
    """Tells `activity` what `load` reports."""

    def report(what: str, done: int, total: int) -> None:
        units = {"compiling": "kernels", "measuring": "figures"}
        activity.update(what, done, total, units.get(what.partition(" ")[0], BYTES))

    return report


def open_model(options: ModelOptions) -> OpenedModel:
    """Find the model (downloading it if it is on the Hub), read its configuration and tokenizer."""
    folder = find_folder(options)
    import_libraries(options)
    from moe_offload.loading import read_config
    from moe_offload.prompts import read_tokenizer

    return OpenedModel(options, folder, read_config(folder), read_tokenizer(folder))


def find_folder(options: ModelOptions, *, shards: bool = True) -> Path:
    """The model's folder; a download shows the Hub's own progress bars, at a terminal."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not options.show_progress or not terminal.console().is_terminal:
        disable_progress_bars()
    return find_model(options.name, revision=options.revision, shards=shards)


def import_libraries(options: ModelOptions) -> None:
    """Import torch and transformers, which takes seconds, and have them speak only when asked."""
    with Activity("starting", enabled=options.show_progress):
        from transformers.utils import logging

        import moe_offload.loading  # noqa: F401
    if not options.verbose:
        logging.set_verbosity(50)  # transformers logs as an error what it then raises


class _Counted:
    """In the place of transformers' tqdm: the same iteration, told to our line on the terminal."""

    def __init__(
        self,
        items: Any = (),
        *,
        activity: Activity,
        desc: str | None = None,
        total: int | None = None,
        **_: Any,
    ) -> None:
        self._items = items
        self._activity = activity
        self._what = (desc or "loading").lower()
        self._total = total if total is not None else len(items) if hasattr(items, "__len__") else None
        self._done = 0

    def __iter__(self) -> Any:
        for item in self._items:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        self._activity.update(self._what, self._done, self._total, "tensors")

    def __getattr__(self, name: str) -> Any:
        """tqdm's other methods (set_description, close, ...): nothing to do."""
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        pass
