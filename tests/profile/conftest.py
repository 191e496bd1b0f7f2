"""Measurements to summarise and to draw, made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from dynexport.exporter.profile import Measured, Ratios

MakeMeasured = Callable[..., Measured]


@pytest.fixture
def make_measured() -> MakeMeasured:
    """Random contributions, a few of them 0 and a few very large."""

    def make(
        layers: int = 5, tokens: int = 40, window: int = 16, blocks: Sequence[str] = ("attention", "mlp")
    ) -> Measured:
        random = np.random.default_rng(0)

        def ratios() -> Ratios:
            values = random.lognormal(-1.5, 1, size=(2, layers, tokens))
            values[:, 0, 0], values[:, -1, -1] = 0, 1e30
            return Ratios(*values)

        return Measured(
            tokens=np.arange(tokens),
            window=window,
            blocks={name: ratios() for name in blocks},
            layer=ratios(),
            influence=random.random((layers, tokens)),
        )

    return make
