"""The server against its own OpenAPI document, with requests that schemathesis makes from it."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from live import KEY, Live
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
HEADERS = {"Authorization": f"Bearer {KEY}"}
OPERATIONS = {
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
}


def operations(live: Live) -> dict[tuple[str, str], Any]:
    schema = schemathesis.openapi.from_url(f"{live.address}/openapi.json", headers=HEADERS)
    found = [result.ok() for result in schema.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


def test_the_document_has_all_operations(live: Live) -> None:
    assert set(operations(live)) == OPERATIONS


def test_requests_made_from_the_document_are_answered_as_it_says(live: Live) -> None:
    statuses: dict[int, int] = {}

    def try_one(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "small"  # a random name is refused before anything else is read
            case.body.pop("depth", None)
        response = case.call_and_validate(headers=HEADERS, checks=CHECKS, timeout=20)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    for operation in operations(live).values():
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + bool(operation.body)]:
            strategy = operation.as_strategy(generation_mode=mode)
            run = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
            run(given(case=strategy)(try_one))()
    assert statuses.get(200, 0) > 5
    assert statuses.get(400, 0) > 20
    assert live.rows_are_free()
    assert not live.reported
