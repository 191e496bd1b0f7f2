"""What tests of several folders share: tiny models, saved once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_models import FAMILIES, VARIANTS, save_model

# A job in the background may be started with interrupts ignored, and commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# CI tries the same examples every time, so that a change is judged by what it changes; elsewhere they are new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests build is remembered apart from what the user has built."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model, or of a variant's, by its name."""
    import torch

    torch.set_num_threads(1)  # more only get into the way of each other at these sizes

    @cache
    def save(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_model(directory, *VARIANTS.get(name, (name, FAMILIES.get(name, {}))))
        return directory

    return save
