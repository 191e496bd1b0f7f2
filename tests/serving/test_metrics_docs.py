"""What names metrics, the table in the docs and the dashboard, agrees with what is exposed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from house import ROOT
from requests_of_tests import Inbox, run, work
from test_serving_metrics import Exposed, golden_model, served  # noqa: F401 - fixture

from dynexport.runtime.generation.model import Model

DASHBOARD = ROOT / "samples" / "grafana" / "dashboard.json"
PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module")
def exposed(golden_model: Callable[[str], Model]) -> Exposed:  # noqa: F811
    """Every metric: of a model with routers and golden vectors, after a request."""
    model = golden_model("mod-router")
    metrics, worker = served(model)
    worker.scheduler.add(work(model, [1, 2, 3], 5, Inbox()))
    run(worker.scheduler)
    return Exposed(metrics)


def table(exposed: Exposed) -> Iterator[str]:
    for family in exposed.families:
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        names = {label for sample in family.samples for label in sample.labels} - {"model_name", "le"}
        labels = ", ".join(f"`{label}`" for label in sorted(names))
        yield f"| `{name}` | {family.type} | {labels} | {family.documentation} |"


def test_the_docs_list_every_metric(exposed: Exposed) -> None:
    listed = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `(vllm:|dynexport_)", line)]
    assert [re.sub(" +", " ", line) for line in listed] == sorted(re.sub(" +", " ", line) for line in table(exposed))


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel.get("targets", []))


def test_the_dashboard_asks_for_what_is_exposed(exposed: Exposed) -> None:
    asked = [found for text in expressions() for found in re.findall(r"((?:vllm:|dynexport_)\w+)\{(.*?)\}", text)]
    assert len(asked) == sum(len(re.findall("vllm:|dynexport_", text)) for text in expressions()) > 30
    for name, selector in asked:
        assert name in exposed.names
        wanted = dict(re.findall(r'(\w+)="(.*?)"', selector))
        assert exposed.all(name, **wanted), f"{name}{{{selector}}}"
        assert 'model_name=~"$model"' in selector
    labels = {label for family in exposed.families for sample in family.samples for label in sample.labels}
    for text in expressions():
        for names in re.findall(r"(?:by|ignoring) \((.*?)\)", text):
            assert set(names.split(", ")) <= labels
    every = {name for name in exposed.names if not name.endswith(("_created", "_count", "_sum", "_bucket"))}
    assert every - {name for name, _ in asked} == set()


def test_panels_do_not_overlap() -> None:
    places = [
        (x, y)
        for panel in panels()
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    assert all(panel["description"].endswith(".") for panel in panels() if panel["type"] != "row")
