"""Requests with a schema among others: each gives what it gives alone, and a failure is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import skip_bundle  # noqa: F401 - fixture
from requests_of_tests import CHUNK, Inbox, run

from dynexport.runtime import Bundle, Model, Sampling
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import make_work

WORDS = {"type": "array", "items": {"enum": [0, 12, 999, "no", True]}, "minItems": 2, "maxItems": 9}
PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def model(skip_bundle: Path) -> Model:  # noqa: F811
    return Model(Bundle.open(skip_bundle), threads=1)


def test_a_schema_holds_beside_other_requests(model: Model) -> None:
    scheduler = Scheduler(model.executor, Settings(rows=5, chunk=CHUNK))
    (comma,) = model.text.encode(",")
    wanted: list[dict[str, Any]] = [
        {"schema": WORDS, "n": 2, "sampling": Sampling(temperature=2.0, seed=4), "max_new_tokens": 90},
        {"max_new_tokens": 20},
        {"schema": WORDS, "max_new_tokens": 5},
        {"stop_token_ids": [model.generate(PROMPT, max_new_tokens=4).ids[3]], "max_new_tokens": 20},
    ]
    inboxes = [Inbox() for _ in wanted]
    for options, inbox in zip(wanted, inboxes, strict=True):
        scheduler.add(make_work(model, PROMPT, deliver=inbox, **options))
    refused = Inbox()
    forbids = Sampling(suppress_tokens=(comma,))
    scheduler.add(make_work(model, PROMPT, deliver=refused, schema={"const": [0, 1]}, sampling=forbids))
    run(scheduler)
    for options, inbox in zip(wanted, inboxes, strict=True):
        rows = model.choices(PROMPT, options.pop("n", 1), chunk=CHUNK, **options)
        assert list(inbox.tokens.values()) == [row.ids for row in rows]
        assert inbox.failure is None
        for row in rows if "schema" in options else ():
            if options["max_new_tokens"] == 90:
                assert row.finish_reason == "stop" and 2 <= len(json.loads(row.text)) <= 9
            else:
                assert (row.finish_reason, len(row.ids)) == ("length", 5)
    assert refused.failure == "failed"
    assert refused.deliveries[-1].failure is not None
    assert "expected a token that may be generated" in refused.deliveries[-1].failure.message
