"""docs/architecture.md leads through code that exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from test_imports import ORDER

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
NAMES = sorted(set(re.findall(r"`(mtkd(?:\.\w+)+)`", PAGE)))


def found(name: str) -> object:
    """A module, or what stands in one under the rest of the name."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_function_of_a_journey_exists(name: str) -> None:
    found(name)


def test_the_page_has_five_journeys_and_the_order_of_the_packages() -> None:
    assert len(re.findall(r"^## ", PAGE, re.M)) == 5
    (order,) = re.findall(r"from those before it: `([^`]*)`", PAGE)
    assert tuple(order.replace("\n", " ").split(", ")) == ORDER
