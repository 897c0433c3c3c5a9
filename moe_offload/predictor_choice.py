"""Which predictor a model gets: the `predictor` option (--predictor) against what there is.

auto        the one that was trained for exactly this model, if it is kept on this machine; else none
off         none: experts' popularity, and those of the last token
look-ahead  the next layers' own routers, applied to what is known now; needs no training
FILE        that one, which has to be of this model
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from moe_offload.cpu_kernels.team import Team
from moe_offload.models.errors import OptionError, UnsupportedModelError
from moe_offload.models.routers import read_routers
from moe_offload.models.spec import MoeSpec
from moe_offload.options import LOOK_AHEAD, NO_PREDICTOR, NO_PREDICTOR_FILE, Progress
from moe_offload.predictor.errors import PredictorError
from moe_offload.predictor.fast_network import FastNetwork
from moe_offload.predictor.fast_weights import Look, look_ahead
from moe_offload.predictor.network import SourceNetwork
from moe_offload.predictor_folder import predictor_path

logger = logging.getLogger(__name__)


class ChosenPredictor(NamedTuple):
    """A predictor: its name for people, and its networks."""

    name: str
    networks: tuple[SourceNetwork, ...]


def choose_predictor(
    option: str | os.PathLike[str], spec: MoeSpec, fingerprint: Callable[[], str]
) -> ChosenPredictor | None:
    """The predictor for a model with this spec; fingerprint: of its weights (`pack_key.content_key`).

    Raises OptionError when a file is named that is no predictor of this model.
    """
    if option == NO_PREDICTOR:
        return None
    if option == LOOK_AHEAD:
        return ChosenPredictor(LOOK_AHEAD, tuple(look_ahead(layer.num_experts) for layer in spec.layers))
    from moe_offload.predictor.network_file import read_networks

    named = option not in NO_PREDICTOR_FILE
    model = fingerprint()
    path = Path(option) if named else predictor_path(spec.model_type, model)
    if not named and not path.exists():
        return None
    try:
        found = read_networks(path, model)
    except PredictorError as error:
        if named:
            words = "" if path.exists() else f" (or say {', '.join(NO_PREDICTOR_FILE)})"
            raise OptionError(f"predictor (--predictor): {error}{words}") from error
        logger.warning("the predictor kept for this model is of no use: %s", error)
        return None
    shape = (found.info.layers, found.info.experts, found.info.hidden_size)
    first = spec.layers[0]
    if shape != (len(spec.layers), first.num_experts, first.hidden_size):
        raise OptionError(f"{path} is of this model, but not of its shape: train it again")
    return ChosenPredictor(path.name, found.networks)


def make_network(
    model: PreTrainedModel, chosen: ChosenPredictor, team: Team, progress: Progress | None = None
) -> FastNetwork | None:
    """The predictor, ready to run beside the model; None for a model whose routers are not understood.

    A few tokens go through the model, to find its routers.
    """
    try:
        sources = read_routers(model).sources
    except UnsupportedModelError as error:
        logger.warning("no predictor: %s", error)
        return None
    looks = []
    for done, each in enumerate(sources):
        if progress is not None:
            progress("preparing kernels (predictor)", done, len(sources))
        looks.append(Look(each.rows, each.bias, each.select, each.selection_bias))
    engine: Any = model.offload
    return FastNetwork(looks, chosen.networks, engine.spec.layers[0].top_k, team)
