"""What the routers choose: a generator, and the demo model on text that it was not trained on.

The generator draws, for every layer and token, the K experts with the largest sums of

    popularity of the expert in its layer          normal, the same for all sequences
    what the sequence is about                     normal, one for each sequence, the same for all of its tokens
    the token                                      Gumbel noise
    a bonus for experts of the token before        in some of the cases, so that repeats reach the shape's figure

The two spreads are chosen so that the most used experts of 25 and 50 % of the slots catch about 65 and 85 % of a single
sequence's choices where there are 64 experts or more, as caches of real models do; they are smaller for Mixtral and
gpt-oss, whose tokens differ more. Repeats: Qwen3-30B 38 to 43 %, gpt-oss 18 % (published); DeepSeek-V2-Lite and
Mixtral: assumed.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.servers.shapes import Shape

POPULARITY = 0.9  # standard deviations, in units of the logarithm of a probability
SUBJECT = 1.1
_BONUS = 50.0

_ROOT = Path(__file__).parents[2]
_DEMO = _ROOT / "models" / "demo"
_TEXT = _ROOT / "tests" / "data" / "held_out_sched.txt"

Choices = NDArray[np.int64]  # [steps, L, T, K]


def generate(shape: Shape, batch: int, steps: int, seed: int = 0) -> Choices:
    """Routing of `batch` independent sequences over `steps` tokens each."""
    random = np.random.default_rng(seed)
    layers, experts, top_k = shape.layers, shape.experts, shape.top_k
    popularity = shape.skew * POPULARITY * random.standard_normal((layers, 1, experts))
    taste = popularity + shape.skew * SUBJECT * random.standard_normal((layers, batch, experts))
    again = 0.0 if shape.repeats is None else _repeat_probability(shape, taste, random)
    choices = np.empty((steps, layers, batch, top_k), np.int64)
    at = np.arange(layers)[:, None, None], np.arange(batch)[None, :, None]
    for step in range(steps):
        score = taste + random.gumbel(size=taste.shape)
        if step:
            before = choices[step - 1]
            kept = random.random(before.shape) < again
            score[(*at, before)] += np.where(kept, _BONUS, 0.0)
        choices[step] = np.argpartition(-score, top_k - 1, axis=2)[..., :top_k]
    return choices


def repeats(choices: Choices) -> float:
    """Share of choices that the same sequence's token before had made in the layer too."""
    now, before = choices[1:, ..., :, None], choices[:-1, ..., None, :]
    return float((now == before).any(axis=-1).mean())


def _repeat_probability(shape: Shape, taste: NDArray[np.float64], random: np.random.Generator) -> float:
    """How often an expert has to be kept so that the share of repeats is the shape's: chance repeats some by itself."""
    assert shape.repeats is not None
    first, second = (
        np.argpartition(-(taste + random.gumbel(size=taste.shape)), shape.top_k - 1, axis=2)[..., : shape.top_k]
        for _ in range(2)
    )
    chance = float((second[..., :, None] == first[..., None, :]).any(axis=-1).mean())
    return max(shape.repeats - chance, 0.0) / (1.0 - chance)


def demo(layers: int, batch: int, steps: int) -> Choices:
    """The demo model's choices on held-out text. Layers beyond its own are its own again, on text further on."""
    chosen = _demo_choices()  # [N, 6, K]
    tokens, own, _ = chosen.shape
    step, layer, sequence = np.ogrid[:steps, :layers, :batch]
    # sequences start at even distances, repeated layers at others: no two rows are alike
    start = (sequence * (tokens // batch) + (layer // own) * (tokens // 5 + 1)) % tokens
    return np.asarray(chosen[(start + step) % tokens, layer % own])


@cache
def _demo_choices() -> Choices:
    """[N, L, K] on the text, a window at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(_DEMO, experts_implementation="eager").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(_DEMO)
    ids = tokenizer(_TEXT.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt")["input_ids"]
    found: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def note(layer: int) -> Any:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            found[layer].append(inputs[1])

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(note(number))
    window = model.config.max_position_embeddings
    with torch.no_grad():
        for start in range(0, ids.shape[1], window):
            model(ids[:, start : start + window])
    return torch.stack([torch.cat(parts) for parts in found], dim=1).numpy()
