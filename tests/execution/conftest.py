"""Executors that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import dense_bundle, ids_bundle, skip_bundle  # noqa: F401 - fixtures

from dynexport.runtime import Bundle
from dynexport.runtime.execution.executor import Executor


@pytest.fixture(scope="session")
def bundle(skip_bundle: Path) -> Bundle:  # noqa: F811
    return Bundle.open(skip_bundle)


@pytest.fixture(scope="session")
def executor(bundle: Bundle) -> Executor:
    return Executor(bundle, threads=1)


@pytest.fixture(scope="session")
def short(ids_bundle: Path) -> Executor:  # noqa: F811
    """Of a bundle with a context of 24 tokens."""
    return Executor(Bundle.open(ids_bundle), threads=1)
