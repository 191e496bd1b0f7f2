"""What tests of several folders share: tiny models, saved once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny_models import FAMILIES, VARIANTS, save_model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model, or of a variant's, by its name."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # more only get into the way of each other at these sizes

    @cache
    def save(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_model(directory, *VARIANTS.get(name, (name, FAMILIES.get(name, {}))))
        return directory

    return save
