"""What every test may ask for."""

from pathlib import Path

import pytest

from nanovllm.models.checkpoint import locate


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the built-in model; the first run ever fetches it."""
    return locate("smollm2-135m")
