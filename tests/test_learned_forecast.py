"""A predictor beside a model on the virtual device: it is asked and learns, no token changes; and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import moe_offload
from moe_offload.device_side import DeviceSide
from moe_offload.learned_forecast import SPARSE
from moe_offload.models.errors import OptionError
from moe_offload.models.routers import read_routers
from moe_offload.options import Options
from moe_offload.pack_key import content_key
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.network import Block, SourceNetwork, input_size
from moe_offload.predictor.network_file import FORMAT, NetworkInfo, write_networks
from tests import tiny_models
from tests.conftest import Checkpoints
from tests.device_cases import PROFILE, expected, generate, on_cpu, on_device, padded, side_of

EXPERTS, PROJECTED, UNITS = 16, 8, 16


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoints) -> Path:
    return checkpoint("qwen3_moe", num_experts=EXPERTS, num_hidden_layers=4)


def random_network(hidden: int, seed: int) -> SourceNetwork:
    """Weights of no meaning."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> NDArray[np.float32]:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[-1]), np.float32)

    size = input_size(EXPERTS, PROJECTED)
    return SourceNetwork(
        random(PROJECTED, hidden), random(PROJECTED), random(UNITS, size), random(UNITS), random(UNITS, size),
        random(UNITS), (Block(random(UNITS, UNITS), random(UNITS), random(UNITS, UNITS)),) * (seed % 3),
        random(3, EXPERTS, UNITS), random(3, EXPERTS), np.full((2, 3), 1.5, np.float32),
        np.full((2, 3), -0.3, np.float32),
    )  # fmt: skip


def write_random(folder: Path, path: Path, model: str | None = None) -> Path:
    """A predictor for the model in the folder, that was never trained."""
    engine = on_cpu(folder).offload
    spec = engine.spec
    key = content_key(spec, engine._skeleton.checkpoint)
    hidden = spec.layers[0].hidden_size
    info = NetworkInfo(
        FORMAT, model or key, spec.model_type, len(spec.layers), EXPERTS, spec.layers[0].top_k, hidden, PROJECTED, 1
    )
    write_networks(path, info, [random_network(hidden, source) for source in range(len(spec.layers))])
    return path


def asked(side: DeviceSide, hear: Callable[[int, NDArray[np.float64], int], None]) -> None:
    """Have the forecast asked for the next layer at every layer, as the prefetcher does where it pays."""
    run, last = side.dispatcher.run, len(side.dispatcher.parts.kinds) - 1

    def ask(layer: int, experts: Any, rows: Any, tokens: int, work: Any) -> None:
        if layer < last:
            hear(layer + 1, side.forecast.presence(layer + 1, tokens), tokens)
        run(layer, experts, rows, tokens, work)

    side.dispatcher.run = ask  # type: ignore[method-assign]


@pytest.mark.parametrize("predictor", ["off", "look-ahead", "random"])
def test_no_token_changes(predictor: str, folder: Path, tmp_path: Path) -> None:
    """Left padded, three sequences, beyond the prompt; twice, for what is kept from one text to the next."""
    if predictor == "random":
        predictor = str(write_random(folder, tmp_path / "random.safetensors"))
    ids = tiny_models.token_ids(3, 9)
    ways = padded(ids, [0, 2, 4])
    alone = tiny_models.token_ids(1, 70)
    with on_device(folder, 12, predictor=predictor) as model:
        asked(side_of(model), lambda *_: None)
        for _ in range(2):
            assert generate(model, ids, max_new_tokens=12, **ways) == expected(folder, ids, max_new_tokens=12, **ways)
        assert generate(model, alone) == expected(folder, alone)
        found = model.offload.stats().predictor
        if predictor == "off":
            assert found is None
            return
        assert found is not None and found.calls > 20 and found.microseconds is not None
        assert found.adaptation in ("frozen", "adapted") and found.memory > 0
        assert all(share is None or 0 <= share <= 1 for share in found.recall)
        assert found.name in found.describe()


def test_what_it_says(folder: Path) -> None:
    """The next router's scores of what this layer's experts are given."""
    with on_device(folder, 12, predictor="look-ahead", adapt=False) as model:
        side, routers = side_of(model), read_routers(model)
        learned = side.learned
        assert learned is not None
        found: list[float] = []

        def compare(layer: int, presence: NDArray[np.float64], tokens: int) -> None:
            if tokens == 1:
                top_k = learned.network.top_k
                scores = routers.sources[layer].look(side._tensors.host_inputs()[0])[0, 0]
                best = [set(np.argsort(-each)[:top_k].tolist()) for each in (presence, scores)]
                found.append(len(best[0] & best[1]) / top_k)

        asked(side, compare)
        generate(model, tiny_models.token_ids(1, 9), max_new_tokens=20)
        assert len(found) > 50 and np.mean(found) > 0.95
        assert learned.stats().adaptation == "off"


def test_of_many_tokens_every_other_layer_predicts(folder: Path) -> None:
    """The layer between goes by what was said before it, and is not left without a word."""
    with on_device(folder, 12, predictor="look-ahead", adapt=False) as model:
        side = side_of(model)
        assert side.learned is not None
        layers, predicted, fresh = 4, [], []
        predict = side.learned.network.predict

        def count(source: int, *args: Any) -> Any:
            predicted.append(source)
            return predict(source, *args)

        side.learned.network.predict = count  # type: ignore[method-assign, assignment]
        side.forecast.usual.usual_presence = lambda *_: np.full(EXPERTS, 0.5)  # type: ignore[method-assign]
        asked(side, lambda layer, *_: fresh.append(side.forecast.fresh(layer)))
        for tokens, wanted in ((SPARSE - 1, [1, 2, 3]), (SPARSE, [1, 3])):
            predicted.clear()
            fresh.clear()
            with torch.no_grad():
                model(tiny_models.token_ids(tokens, 1))
            assert predicted == wanted and fresh == [True] * (layers - 1)


def test_every_router(checkpoint: Checkpoints) -> None:
    for family in ("mixtral", "gpt_oss", "deepseek_v3"):
        folder = checkpoint(family)
        ids = tiny_models.token_ids(2, 9)
        with on_device(folder, 8, predictor="look-ahead") as model:
            assert generate(model, ids) == expected(folder, ids)
            assert model.offload.stats().predictor is not None


def test_the_kept_predictor_is_taken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_offload import predictor_choice

    kept = tmp_path / "kept.safetensors"
    monkeypatch.setattr(predictor_choice, "predictor_path", lambda *_: kept)
    with on_device(folder, 12) as model:
        assert model.offload.stats().predictor is None
    write_random(folder, kept)
    with on_device(folder, 12) as model:
        assert model.offload.stats().predictor.name == "kept.safetensors"
    kept.write_bytes(kept.read_bytes()[:-5])  # a damaged one is no reason not to run
    with on_device(folder, 12) as model:
        assert model.offload.stats().predictor is None


def test_a_predictor_of_another_model(folder: Path, tmp_path: Path) -> None:
    path = write_random(folder, tmp_path / "other.safetensors", model="0" * 64)
    with pytest.raises(OptionError, match="0000000000000000"):
        with on_device(folder, 12, predictor=str(path)):
            pass


@pytest.mark.parametrize(
    "options", [dict(device="cpu"), dict(device=PROFILE, policy="lru"), dict(device="virtual:tiny-t4", policy="static")]
)
def test_a_predictor_that_has_nobody_to_tell(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    path = write_random(folder, tmp_path / "mine.safetensors")
    with pytest.raises(OptionError, match="mine.safetensors"):
        with on_device(folder, **(dict(predictor=str(path)) | options)):
            pass


def test_options() -> None:
    assert Options(predictor="look-ahead", device="cpu").names_predictor is False
    for wrong in ("", 3, None):
        with pytest.raises(OptionError, match="predictor"):
            Options(predictor=wrong)  # type: ignore[arg-type]


def test_missing_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no predictor"):
        with on_device(folder, 12, predictor=tmp_path / "nothing"):
            pass


def test_memory_goes_with_the_device(folder: Path) -> None:
    """A closed engine keeps the network, which is the host's; asking it is over."""
    with on_device(folder, 12, predictor="look-ahead") as model:
        side = side_of(model)
        assert side.learned is not None and isinstance(side.learned.network, FastNetwork)
        generate(model, tiny_models.token_ids(1, 5))
        with torch.no_grad():
            model(tiny_models.token_ids(2, 3))  # without a cache
        model(inputs_embeds=torch.zeros(1, 2, model.config.hidden_size))
    assert moe_offload is not None
