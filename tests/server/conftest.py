"""A small random model for every server here."""

from pathlib import Path

import pytest

from tests.llm.helpers import save_tiny


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, smollm2)
    return folder
