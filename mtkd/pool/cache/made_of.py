"""What a cache keeps of the shape of its teacher: the configuration of a model, or what a plug-in says of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from mtkd.errors import DataError
from mtkd.models import glm  # noqa: F401  registers our own type
from mtkd.models.info import ModelInfo, model_info
from mtkd.models.numbers import count_parameters

_PLUGGED = "mtkd-plug-in"  # in the place of an architecture
CALIBRATION = "mtkd_calibration"
"""Key of these values: how the teacher was calibrated before its logits were stored."""


def model_values(config: PretrainedConfig) -> dict[str, Any]:
    """A model's configuration without the folder that it lay in, and the version that wrote it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # a GLM's field that came later stands there only where it says something: caches made before stay valid
    unsaid = ("eop_token_id",) if values.get("eop_token_id") is None else ()
    return {
        key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version", *unsaid)
    }


def plugged_values(info: ModelInfo, parameters: int) -> dict[str, Any]:
    """The shape of a plug-in's teacher."""
    return {"model_type": _PLUGGED, "info": {**asdict(info), "taps": sorted(info.taps)}, "parameters": parameters}


def shape_of(values: Mapping[str, Any], auto_class: str, where: str) -> tuple[ModelInfo, int]:
    """(shape, parameters) of the teacher that a cache was made of.

    Args: auto_class: the teacher's head, from the task.
    Raises:
        DataError: neither of the two forms.
    """
    values = {key: value for key, value in values.items() if key != CALIBRATION}
    try:
        if values["model_type"] == _PLUGGED:
            info = ModelInfo(**{**values["info"], "taps": frozenset(values["info"]["taps"])})
            return info, int(values["parameters"])
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError("the cache does not tell which model its teacher was", where=where, found=str(error)) from None
    return model_info(config, auto_class), count_parameters(config, auto_class)
