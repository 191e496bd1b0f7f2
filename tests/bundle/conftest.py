"""A bundle that each test damages in its own copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import copied, skip_bundle  # noqa: F401 - a fixture


@pytest.fixture
def bundle(skip_bundle: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copied(skip_bundle, tmp_path / "bundle")
