"""Bundles that the tests of the runtime share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from bundles import dense_bundle, ids_bundle, skip_bundle  # noqa: F401 - fixtures

from dynexport.runtime import Bundle, Model

sys.path.append(str(Path(__file__).parent.parent / "execution"))


@pytest.fixture(scope="session")
def bundle(skip_bundle: Path) -> Bundle:  # noqa: F811
    return Bundle.open(skip_bundle)


@pytest.fixture(scope="session")
def generator(bundle: Bundle) -> Model:
    return Model(bundle, threads=1)


@pytest.fixture(scope="session")
def short(ids_bundle: Path) -> Model:  # noqa: F811
    """Of a bundle with a context of 24 tokens and no tokenizer."""
    return Model(Bundle.open(ids_bundle), threads=1)
