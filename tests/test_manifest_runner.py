"""A runner that knows the manifest alone gets the conformance tokens, and every rule of docs/bundle.md matters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, change_manifest, checkpoint, copied
from manifest_runner import PAST, Caches, Engine, Json, Runner, WholeStep
from tiny_models import save_radial_model

from dynexport.exporter.bundle.conversion import convert

FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "static": {"static": True},
    "single": {"layer_capacity": 1.0},
    "tensorrt": {"target": "tensorrt"},
    "fp16": {"target": "tensorrt", "precision": "fp16"},
    "int8 caches": {"kv_cache_dtype": "int8", "kv_cache_text": np.random.default_rng(1).integers(0, 89, 2000)},
}
KINDS = [
    *(("dense", form) for form in ("", "tensorrt", "fp16", "int8 caches")),
    ("dense-tied-mqa", ""),
    *(("skip-2x", form) for form in ("", "static", "tensorrt", "fp16")),
    *(("skip-3x", form) for form in ("", "static")),
    *(("skip-keep", form) for form in ("", "static")),
    *((case, form) for case in ("mod-router", "mod-topk", "mod-overflow", "mod-compact") for form in ("", "tensorrt")),
    ("mod-overflow", "static"),
    *(("radial-step", form) for form in ("", "single", "tensorrt", "fp16")),
    *(("radial-layer", form) for form in ("", "single")),
    *((case, "") for case in ("radial-own-routers", "radial-gated-noexit")),
    *(("radial-noreuse-min", form) for form in ("", "single")),
]
# What a rounding may change: in float32, in float16, and of keys and values to int8.
NEAR_TIES = {"fp16": 0.03, "int8 caches": 0.15}
# The rows' runs, the longest between the others; and how many tokens each has after every stage: at first the second
# one waits with room in its cache, in the end with a full one.
ROWS = (0, 2, 1)
STAGES = ((3, 1, 3), (5, 16, 9), (16, 16, 16))


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The bundle of a conformance checkpoint in one of the forms."""

    @cache
    def converted(case: str, form: str) -> Path:
        path = tmp_path_factory.mktemp(case) / "bundle"
        convert(CONFORMANCE / case, path, **FORMS[form], golden=False)
        return path

    return converted


def answers(case: str, form: str) -> list[tuple[list[int], list[int]]]:
    """Of every row the prompt, and the tokens up to the first near-tie, from where on a rounding may change them."""
    runs = json.loads((CONFORMANCE / case / "expected.json").read_text())["runs"]
    least = NEAR_TIES.get(form, 2e-3)
    ends = [next((i for i, margin in enumerate(run["logit_margins"]) if margin < least), 16) for run in runs]
    return [(runs[row]["prompt"], runs[row]["greedy"][: ends[row]]) for row in ROWS]


def generated(bundle: Path, prompts: list[list[int]], chunk: int = 1024) -> list[list[int]]:
    """What a runner generates, stage by stage; its caches have just the slots that are needed."""
    runner = Runner(bundle, len(prompts), max(len(prompt) + 15 for prompt in prompts), chunk)
    depth = next((depth["name"] for depth in runner.bundle.manifest["depths"] if depth["trained"]), "full")
    done = [[int(row.argmax())] for row in runner.feed("prompt", depth, prompts)]
    for stage in STAGES:
        while any(len(ids) < count for ids, count in zip(done, stage, strict=True)):
            going = [len(ids) < count for ids, count in zip(done, stage, strict=True)]
            fed = [ids[-1:] if goes else [] for ids, goes in zip(done, going, strict=True)]
            for ids, goes, row in zip(done, going, runner.feed("decode", depth, fed), strict=True):
                ids += [int(row.argmax())] * goes
    return done


def agree(found: list[list[int]], expected: list[list[int]]) -> bool:
    """Whether rows begin with what is expected."""
    return all(ids[: len(wanted)] == wanted for ids, wanted in zip(found, expected, strict=True))


def test_it_is_small_and_imports_nothing_of_ours() -> None:
    source = (Path(__file__).parent / "manifest_runner.py").read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE)) == {
        *("__future__", "collections", "hashlib", "json", "pathlib", "typing", "numpy", "onnxruntime")
    }
    assert sum(bool(line.strip()) for line in source.splitlines()) < 200


@pytest.mark.parametrize(("case", "form"), KINDS, ids=["-".join(filter(None, kind)) for kind in KINDS])
def test_the_conformance_tokens(bundle_of: Callable[[str, str], Path], case: str, form: str) -> None:
    prompts, expected = map(list, zip(*answers(case, form), strict=True))
    assert sum(map(len, expected)) > 16
    for chunk in (1024, 7):  # all rows together where limits allow that; row by row, in pieces
        assert agree(generated(bundle_of(case, form), prompts, chunk), expected)


def test_a_second_turn_goes_on_top_of_the_first(bundle_of: Callable[[str, str], Path]) -> None:
    for case, form in (("dense", ""), ("mod-router", "tensorrt"), ("radial-step", "single")):
        (prompt, _), (text, expected), *_ = answers(case, form)
        runner = Runner(bundle_of(case, form), 2, 128)
        runner.feed("prompt", "full", [prompt, text[:9]])
        logits = runner.feed("prompt", "full", [[], text[9:]])
        assert int(logits[1].argmax()) == expected[0]


@dataclass(frozen=True)
class Fault:
    """What a runner does that ignores a rule.

    Attributes:
        manifest: changes the manifest that it goes by.
        inputs: changes what it gives to a graph.
        method: what one of its functions is replaced by, of a class.
    """

    rule: str
    case: str
    form: str = ""
    manifest: Callable[[Json], object] | None = None
    inputs: Callable[[Json], object] | None = None
    method: tuple[type, str, Callable[..., Any]] | None = None
    chunk: int = 1024


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Json], object]:
    """Change one input, where a graph is given it."""
    return lambda inputs: inputs.update({name: change(np.array(inputs[name]))}) if name in inputs else None


def all_decode_with(graph: str) -> Callable[[Json], object]:
    """A program for decoding that is the prompt's."""
    return lambda manifest: manifest.update(
        programs=[{"phase": phase, "depth": None, "graph": graph, "set": None} for phase in ("prompt", "decode")]
    )


def of_routing(**fields: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest["routing"].update(fields)


def of_limits(**fields: Any) -> Callable[[Json], object]:
    return lambda manifest: manifest["limits"].update(fields)


def of_caches(**fields: Any) -> Callable[[Json], object]:
    return lambda manifest: [cache.update(fields) for cache in manifest["caches"]]


def padded_left(inputs: Json) -> None:
    """Put padding before the tokens."""
    if "token_counts" in inputs:
        ids, counts = inputs["input_ids"], inputs["token_counts"]
        inputs["input_ids"] = [row[n:] + row[:n] for row, n in zip(ids, counts, strict=True)]
        inputs["logits_indices"] = np.full((len(counts), 1), len(ids[0]) - 1)


def counted_by_tokens(self: WholeStep, results: Json, counts: np.ndarray, active: np.ndarray) -> np.ndarray:
    return np.broadcast_to(counts, (len(self.engine.graph["places"]), len(counts)))


def in_memory_of_its_own(
    self: Engine, inputs: Json, caches: Caches | None = None, rows: slice = slice(0), place: str = ""
) -> Json:
    """Read caches, and leave what the graph gives for them where it is."""
    told = {spec["name"]: spec for spec in self.graph["inputs"]}
    given = {name: inputs[name] for name in told if not name.startswith(PAST)}
    dtypes = {node.name: node.type for node in self.session.get_inputs()}
    kinds = {"tensor(int64)": np.int64, "tensor(bool)": np.bool_, "tensor(float)": np.float32}
    feeds = {name: np.array(value, kinds[dtypes[name]]) for name, value in given.items()}
    assert caches is not None
    feeds |= {name: caches.buffers[place + name.removeprefix(PAST)][rows] for name in told if name.startswith(PAST)}
    names = [node.name for node in self.session.get_outputs()]
    return dict(zip(names, self.session.run(names, feeds), strict=True))


FAULTS = [
    Fault("prompt's program for decode", "skip-2x", "static", all_decode_with("model")),
    Fault("prompt's phase for decode", "mod-topk", inputs=changed("is_prompt", np.ones_like)),
    Fault("decode's program for prompts", "mod-router", "tensorrt", all_decode_with("decode")),
    Fault("full depth for every token", "skip-2x", inputs=changed("layer_active", np.ones_like)),
    Fault("layers in another order", "skip-2x", inputs=changed("layer_active", lambda active: active[::-1])),
    Fault("places in another order", "skip-2x", inputs=changed("cache_lengths", lambda lengths: lengths[::-1])),
    Fault("positions from the cache", "skip-2x", inputs=lambda i: i.update(position_ids=i["position_ids"] * 0)),
    Fault("positions that start at 1", "radial-step", inputs=changed("position_ids", lambda ids: ids * 2)),
    Fault("the last place of all rows", "dense", inputs=changed("logits_indices", lambda at: at * 0 + at.max())),
    Fault("padding on the left", "mod-router", inputs=padded_left),
    Fault("a token outside the vocabulary", "dense", inputs=changed("input_ids", lambda ids: ids + 89)),
    Fault("tokens that are padding", "mod-router", inputs=changed("token_counts", lambda n: n * 0 + n.max())),
    Fault("decisions forced", "mod-router", inputs=changed("forced_routes", np.zeros_like)),
    Fault("paths forced", "radial-step", "single", inputs=changed("forced_paths", np.zeros_like)),
    Fault("one entry a token", "mod-router", method=(WholeStep, "entries", counted_by_tokens)),
    Fault("one entry a hop", "radial-step", "single", method=(WholeStep, "entries", counted_by_tokens)),
    Fault("caches not in place", "dense", method=(Engine, "run", in_memory_of_its_own)),
    Fault("no slack", "mod-overflow", "static", of_caches(slack=0), chunk=7),
    Fault("one entry a token in a layer", "radial-own-routers", manifest=of_caches(per_token=1)),
    Fault(
        "the type of caches",
        "dense",
        "fp16",
        lambda m: [p.update(dtype="float") for p in m["caches"][0]["parts"].values()],
    ),
    Fault("a prompt in pieces that competes", "mod-topk", manifest=of_limits(whole_prompts=False), chunk=7),
    Fault("rows together on filled caches", "radial-layer", "single", of_limits(together="empty")),
    Fault("leaving at once", "radial-noreuse-min", manifest=of_routing(min_hops=0)),
    Fault("a layer twice", "radial-noreuse-min", manifest=of_routing(reuse=True)),
    Fault("no leaving", "radial-step", manifest=of_routing(exit=False)),
    Fault("no gates", "radial-gated-noexit", inputs=changed("gates", np.ones_like)),
    Fault("no hop of entries", "radial-layer", inputs=changed("step", np.zeros_like)),
    Fault("caches by hop", "radial-own-routers", manifest=of_routing(places="hops")),
    Fault(
        "one router for all hops",
        "radial-own-routers",
        manifest=lambda m: [p["set"].update(routers=p["set"]["routers"][:1] * 6) for p in m["programs"]],
    ),
    Fault("length of attention", "radial-step", inputs=changed("last_index", lambda last: last * 0)),
    Fault("a full row that takes part", "dense", method=(Runner, "calls", lambda self, tokens: [tokens])),
    Fault("another schema version", "dense", manifest=lambda m: m.update(schema_version=3)),
    Fault("a damaged graph", "dense", manifest=lambda m: m["files"]["model.onnx"].update(sha256="0" * 64)),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.rule)
def test_every_rule_matters(
    bundle_of: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """A runner that ignores one gets other tokens, or an error."""
    bundle = bundle_of(fault.case, fault.form)
    if fault.manifest is not None:
        bundle = copied(bundle, tmp_path / "bundle")
        change_manifest(bundle, fault.manifest)
    if fault.method is not None:
        monkeypatch.setattr(*fault.method)
    if fault.inputs is not None:
        run, change = Engine.run, fault.inputs

        def changed_run(self: Engine, inputs: Json, *caches: Any) -> Json:
            change(inputs)
            return run(self, inputs, *caches)

        monkeypatch.setattr(Engine, "run", changed_run)
    prompts, expected = map(list, zip(*answers(fault.case, fault.form), strict=True))
    try:
        found = generated(bundle, prompts, fault.chunk)
    except (RuntimeError, ValueError, IndexError):  # ONNX Runtime's are RuntimeErrors
        return
    assert not agree(found, expected)


def test_positions_stay_within_the_context(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A row whose context is used up is computed along: there is no next position that the model could look up."""
    model = save_radial_model(tmp_path / "model", saved_model("gpt2"), max_steps=2)
    convert(model, tmp_path / "bundle", layer_capacity=1.0, golden=False)
    runner = Runner(tmp_path / "bundle", 3, 4096)
    longest = runner.bundle.manifest["model"]["max_length"]
    runner.feed("prompt", "full", [[1], [2] * longest, [3]])
    assert runner.feed("decode", "full", [[4], [], [5]]).any(axis=1).tolist() == [True, False, True]
    runner.bundle.manifest["model"]["max_length"] += 1
    with pytest.raises(RuntimeError, match="out of data bounds"):
        runner.feed("decode", "full", [[4], [], [5]])


@pytest.mark.parametrize("form", ["static", "tensorrt"])
def test_pieces_are_short_where_caches_are_filled(tmp_path: Path, form: str) -> None:
    """A padded layer writes as many slots as a piece has tokens, whatever is chosen: a longer one needs more slack."""
    config = {"strategy": "mod", "routed_layers": [0, 1, 2, 3], "decision": {"rule": "always"}}
    model = checkpoint(tmp_path / "model", "mod-overflow", dynexport={**config, "cache": {"capacity": 0.4}})
    convert(model, tmp_path / "bundle", **FORMS[form], golden=False)
    ids = (np.arange(220) * 7 % 89).tolist()
    found = []
    for chunk in (1024, 30):
        runner = Runner(tmp_path / "bundle", 1, 220, chunk)
        runner.feed("prompt", "full", [ids[:110]])
        found.append(runner.feed("prompt", "full", [ids[110:]]))
    assert np.allclose(*found, atol=1e-4)
    runner = Runner(tmp_path / "bundle", 1, 220)
    runner.bundle.manifest["limits"]["filled"] = None
    runner.feed("prompt", "full", [ids[:110]])
    with pytest.raises(RuntimeError):
        runner.feed("prompt", "full", [ids[110:]])
