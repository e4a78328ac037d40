"""The demo models, as they are loaded: each module of tests has its own."""

from typing import Any

import pytest

from polyhead.errors import PolyheadError
from polyhead.hf import load


def demo(name: str) -> Any:
    try:
        return load(name)
    except PolyheadError as error:
        pytest.skip(f"the demo model {name!r} cannot be had: {error}")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return demo("smollm2")


@pytest.fixture(scope="module")
def minilm() -> Any:
    return demo("minilm")
