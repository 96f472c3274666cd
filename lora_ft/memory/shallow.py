"""Estimate the peak of a model of many layers from traces of models of few: layers of one kind add the same bytes.

    peak(every_1, 32 layers)  =  peak(every_1, 3 layers) + 29 * (peak(every_1, 3) - peak(every_1, 1)) / 2
    peak(every_4, 32 layers)  =  3/4 peak(off, 32) + 1/4 peak(every_1, 32)

A trace takes time by the layer. For layers of several kinds it is an estimate; for layers of one kind it is exact but
for the second line.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

_FEW, _MORE = 1, 3
ENOUGH = 8  # a model of so many layers is traced as it is


def extrapolated(peak: Callable[[str, Any], float], setting: str, model_config: Any, is_quick: bool = False) -> float:
    """Return peak(setting, model_config), where `setting` is off or every_k.

    is_quick: `peak` takes little time with off and every_1, so it is asked for all layers.
    """
    layers = num_layers(model_config)
    if layers <= ENOUGH:
        return peak(setting, model_config)
    few, more = (shallow(model_config, count) for count in (_FEW, _MORE))

    def of_all(setting: str) -> float:
        if is_quick:
            return peak(setting, model_config)
        low, high = peak(setting, few), peak(setting, more)
        return high + (layers - _MORE) * (high - low) / (_MORE - _FEW)

    if setting in ("off", "every_1"):
        return of_all(setting)
    share = math.ceil(layers / int(setting.removeprefix("every_"))) / layers
    return (1 - share) * of_all("off") + share * of_all("every_1")


def num_layers(model_config: Any) -> int:
    """Return the number of layers of a model."""
    return int(model_config.get_text_config().num_hidden_layers)


def shallow(model_config: Any, layers: int) -> Any:
    """Return the config of a model of the same kind with fewer layers."""
    found = copy.deepcopy(model_config)
    text = found.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == total:  # something of each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return found
