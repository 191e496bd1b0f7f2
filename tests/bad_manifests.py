"""Manifests that are wrong in one way each, and the words that every runtime refuses them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bad_values import NO_VERSION, PATHS, VALUES, VERSIONS

Change = Callable[[dict[str, Any]], object]
DRAFTING = {"most": 4, "keep": [0, 7], "gain": 1.2}
NGRAMS = {"file": "ngrams.bin", "entries": 9, "tokens": 100, "acceptance": 0.5}
SET = {
    "embedding": "model",
    "routers": ["model"],
    "before_attention": ["model"],
    "attention": "model",
    "after_attention": ["model"],
    "head": "model",
}


def _key(fields: dict[str, Any]) -> dict[str, Any]:
    """The input that is the first layer's key cache."""
    inputs = fields["graphs"][0]["inputs"]
    return next(spec for spec in inputs if spec["name"] == "past_key_values.0.key")


def _cached(fields: dict[str, Any]) -> dict[str, Any]:
    """The same, as the caches describe it."""
    return fields["caches"][0]["parts"]["key"]


def _key_shape(fields: dict[str, Any]) -> list[Any]:
    return _key(fields)["shape"]


def put(place: str, value: object) -> Change:
    """Replace the value at a place, such as "graphs.0.layers"."""
    *way, last = (int(part) if part.isdigit() else part for part in place.split("."))

    def change(fields: dict[str, Any]) -> None:
        parent: Any = fields
        for part in way:
            parent = parent[part]
        parent[last] = value

    return change


# The rest, by name, with words of the error.
OTHERS: tuple[tuple[str, Change, str], ...] = (
    ("no program", lambda f: f["programs"].pop(), "programs: no graph for the phase decode at the depth full; convert"),
    (
        "a hash that is none",
        lambda f: f["files"]["model.data"].update(sha256="x"),
        "files.model.data.sha256: String should match pattern '^[0-9a-f]{64}$', found 'x'",
    ),
    ("no version", lambda f: f.pop("schema_version"), NO_VERSION),
    ("long unknown field", lambda f: f.update({"x" * 9999: 1}), "Extra inputs are not permitted"),
    ("missing field", lambda f: f.pop("cost"), "cost: Field required"),
    ("endless layers", lambda f: f["model"].update(layers=2**31 - 1), "cost.layers: expected 2147483647"),
    ("another contract", lambda f: f["contract"].update(strategy="guess"), "contract: "),
    ("kept layers that are not there", lambda f: f["depths"][0].update(keep=[0, 8]), "keep of depth 2: expected"),
    ("kept layers twice", lambda f: f["depths"][0].update(keep=[0, 0]), "keep of depth 2: expected ascending"),
    ("a ratio twice", lambda f: f["depths"].append(f["depths"][0]), "depths: expected a name for each"),
    ("graph layers", lambda f: f["graphs"][0].update(layers=[-1]), "layers of graph model: expected"),
    ("layers of prompts", lambda f: f["depths"][0].update(prompt=[8]), "prompt of depth 2: expected ascending layers"),
    ("a depth that is everyone's", lambda f: f["depths"][0].update(name="full"), "depths: expected other names than"),
    ("another place", lambda f: f["caches"][0].update(place=8), "caches: expected the places 0..7, found others"),
    ("a cache too few", lambda f: f["caches"].pop(), "caches: expected one for each of 8 layers, found 7"),
    ("no values", lambda f: f["caches"][0]["parts"].pop("value"), "cache 0: value: expected 2 heads of 8 as in model"),
    ("a part that is not there", lambda f: _key(f).update(name="past_key_values.0.step"), "0.step: expected a cache's"),
    ("a place that is not there", lambda f: _key(f).update(name="past_key_values.9.key"), "9.key: expected a cache's"),
    ("no source", lambda f: f["source"].pop("model"), "source.model: Field required"),
    ("a graph without its file", lambda f: f["graphs"][0].update(file="other.onnx"), "expected its file other.onnx"),
    ("no logits", lambda f: f["graphs"][0].update(outputs=[]), "model.onnx: expected an output logits, found none"),
    ("a type that nobody knows", lambda f: _key(f).update(dtype="float8"), "dtype: String should match pattern"),
    ("an input that is not there", lambda f: f["graphs"][0]["inputs"].pop(), "expected the inputs that the manifest"),
    (
        "other heads",
        lambda f: _key_shape(f).__setitem__(1, 1),
        "past_key_values.0.key: expected float ['B', 2, 'M', 8] as in caches, found float ['B', 1, 'M', 8]",
    ),
    ("other head size", lambda f: f["model"].update(head_dim=16), "expected 2 heads of 16 as in model"),
    (
        "a dimension that nobody knows",
        lambda f: _key_shape(f).__setitem__(2, "Q"),
        "as in caches, found float ['B', 2,",
    ),
    (
        "another type of cache",
        lambda f: _key(f).update(dtype="float16"),
        "as in caches, found float16 ['B', 2, 'M', 8]",
    ),
    (
        "other heads of caches",
        lambda f: _cached(f)["shape"].__setitem__(1, 1),
        "cache 0: key: expected 2 heads of 8 as in model, found ['B', 1, 'M', 8]",
    ),
    ("another dimension of caches", lambda f: _cached(f)["shape"].__setitem__(2, "Q"), "caches.0.parts.key.shape.2"),
    ("another type of caches", lambda f: _cached(f).update(dtype="float16"), "expected float16 ['B', 2, 'M', 8] as in"),
    (
        "a profile of two sizes",
        lambda f: f["graphs"][0].update(profiles=[{"name": "decode", "ranges": {"B": [1, 1]}}]),
        "graphs.0.profiles.0.ranges.B.2: Field required",
    ),
    (
        "a profile of four sizes",
        lambda f: f["graphs"][0].update(profiles=[{"name": "decode", "ranges": {"B": [1] * 4}}]),
        "graphs.0.profiles.0.ranges.B: Tuple should have at most 3 items",
    ),
    (
        "another profile",
        lambda f: f["graphs"][0].update(profiles=[{"name": "x", "ranges": {}}]),
        "profiles.0.name: Input should be 'prefill' or 'decode', found 'x'",
    ),
    (
        "an empty dimension",
        lambda f: _key_shape(f).__setitem__(3, 0),
        "constrained-int: Input should be greater than or equal to 1, found 0",
    ),
    (
        "a dimension of nothing",
        lambda f: _key_shape(f).__setitem__(3, None),
        "constrained-int: Input should be a valid integer, found None",
    ),
    (
        "graphs of one name",
        lambda f: f["graphs"].append(f["graphs"][0]),
        "graphs: expected a name for each, found one twice",
    ),
    (
        "a program of an unknown depth",
        lambda f: f["programs"][0].update(depth="it's"),
        'programs: expected a depth of the manifest, found "it\'s"',
    ),
    (
        "a program of an unknown graph",
        lambda f: f["programs"][0].update(graph="x"),
        "programs: expected a graph of the manifest, found 'x'",
    ),
    (
        "a program of nothing",
        lambda f: f["programs"][0].update(graph=None),
        "programs: expected either a graph or a set in each, found both",
    ),
    (
        "a set without paths",
        lambda f: f["programs"][0].update(graph=None, set=SET),
        "programs: expected a set where routing has paths, found one without",
    ),
    (
        "a set of too few routers",
        lambda f: (f.update(routing=PATHS), f["programs"][0].update(graph=None, set=SET)),
        "programs: set: routers: expected 3 names, found 1",
    ),
    (
        "a set of an unknown graph",
        lambda f: f["programs"][0].update(graph=None, set=SET | {"head": "x"}),
        "programs: expected a graph of the manifest, found 'x'",
    ),
    (
        "a set without a head",
        lambda f: f["programs"][0].update(graph=None, set={k: v for k, v in SET.items() if k != "head"}),
        "programs.0.set.head: Field required",
    ),
    (
        "caches of layers, not hops",
        lambda f: f.update(routing=PATHS),
        "caches: expected one for each of 3 hops, found 8",
    ),
    (
        "routing of no layers",
        lambda f: f.update(routing={"kind": "layers", "layers": [], "overflow": "error"}),
        "routing.layers.layers: Tuple should have at least 1 item after",
    ),
    (
        "routing of another overflow",
        lambda f: f.update(routing={"kind": "layers", "layers": [1], "overflow": "x"}),
        "routing.layers.overflow: Input should be 'residual' or 'error', found 'x'",
    ),
    (
        "routing of layers that are not there",
        lambda f: f.update(routing={"kind": "layers", "layers": [8], "overflow": "error"}),
        "routing.layers: expected ascending layers 0..7, found others",
    ),
    (
        "routing of too much capacity",
        lambda f: f.update(routing=PATHS | {"layer_capacity": 2}),
        "routing.paths.layer_capacity: Input should be less than or equal to 1, found 2",
    ),
    (
        "routing of no capacity",
        lambda f: f.update(routing=PATHS | {"layer_capacity": 0}),
        "routing.paths.layer_capacity: Input should be greater than 0, found 0",
    ),
    (
        "a place that is not there in a graph",
        lambda f: f["graphs"][0].update(places=[8]),
        "places of graph model: expected places of caches, found others",
    ),
    (
        "caches without slots",
        lambda f: _cached(f)["shape"].__setitem__(2, "B"),
        "cache 0: key: expected rows B and the slots of its keys",
    ),
    (
        "values of other slots",
        lambda f: f["caches"][0]["parts"]["value"]["shape"].__setitem__(2, 3),
        "cache 0: value: expected rows B and the slots of its keys",
    ),
    (
        "steps of another shape",
        lambda f: f["caches"][0]["parts"].update(step=_cached(f) | {"shape": ["B"]}),
        "cache 0: step: expected rows B and the slots of its keys, found ['B']",
    ),
    (
        "int8 without a scale",
        lambda f: _cached(f).update(dtype="int8"),
        "cache 0: key: expected a scale for int8 and only there",
    ),
    (
        "a scale without int8",
        lambda f: _cached(f).update(scale="x"),
        "cache 0: key: expected a scale for int8 and only there",
    ),
    (
        "text of caches from elsewhere",
        lambda f: f.update(cache_text={"source": "x", "tokens": 1, "sha256": "0" * 64}),
        "cache_text.source: Input should be 'built-in' or 'given', found 'x'",
    ),
    (
        "a table that is not among the files",
        lambda f: f.update(drafting=DRAFTING | {"ngrams": NGRAMS}),
        "drafting.ngrams: expected its file ngrams.bin among files, found none",
    ),
    (
        "a table that is too large",
        lambda f: f.update(drafting=DRAFTING | {"ngrams": NGRAMS | {"entries": 2**18 + 1}}),
        "drafting.ngrams.entries: Input should be less than or equal to 262144, found 262145",
    ),
    (
        "more right than all",
        lambda f: f.update(drafting=DRAFTING | {"ngrams": NGRAMS | {"acceptance": 1.5}}),
        "drafting.ngrams.acceptance: Input should be less than or equal to 1, found 1.5",
    ),
    (
        "no drafts",
        lambda f: f.update(drafting=DRAFTING | {"most": 0}),
        "drafting.most: Input should be greater than or",
    ),
    ("too many drafts", lambda f: f.update(drafting=DRAFTING | {"most": 65}), "less than or equal to 64, found 65"),
    (
        "a gain that is none",
        lambda f: f.update(drafting=DRAFTING | {"gain": 0}),
        "drafting.gain: Input should be greater",
    ),
    (
        "layers that draft and are not there",
        lambda f: f.update(drafting=DRAFTING | {"keep": [0, 8]}),
        "keep of drafting: expected ascending layers 0..7, found others",
    ),
    (
        "a contract of another field",
        lambda f: f["contract"].update(more=1),
        "contract.unified-skip.more: Extra inputs are not permitted, found 1",
    ),
    (
        "a contract of slow ratios",
        lambda f: f["contract"].update(speedups=[0.5]),
        "contract.unified-skip.speedups: expected finite ratios >= 1, found 0.5",
    ),
    (
        "a contract of nothing",
        lambda f: f["contract"].update(keep=[]),
        "contract.unified-skip: keep: expected at least one layer, found none",
    ),
    (
        "a contract that leaves a layer out twice",
        lambda f: f["contract"].update(order=[4, 1, 4]),
        "contract.unified-skip.order: expected every layer once, found [4, 1, 4]",
    ),
    (
        "a contract of layers twice",
        lambda f: f.update(contract={"strategy": "mod", "routed_layers": [1, 1]}),
        "contract.mod.routed_layers: expected different layers from 0, found [1, 1]",
    ),
    (
        "a contract of foreign thresholds",
        lambda f: f.update(contract={"strategy": "mod", "routed_layers": [1], "thresholds": {"2": 1}}),
        "contract.mod: thresholds: expected routed layers, found 2",
    ),
    (
        "a contract of steps in no order",
        lambda f: f.update(contract={"strategy": "radial", "min_steps": 13}),
        "contract.radial: min_steps: expected at most max_steps = 12, found 13",
    ),
    (
        "a contract of exits in no order",
        lambda f: f.update(contract={"strategy": "early-exit", "exits": [2, 1]}),
        "contract.early-exit.exits: expected ascending numbers of layers from 1",
    ),
    (
        "decisions about more layers than there are",
        lambda f: f.update(routing={"kind": "layers", "layers": [0], "span": 99, "overflow": "residual"}),
        "routing.span: expected 8 layers in all, found 1 times 99",
    ),
    *(
        (
            f"a contract of {name}",
            lambda f, fields=fields: f.update(contract={"strategy": "loop", "loops": 2, **fields}),
            f"contract.loop{words}",
        )
        for name, fields, words in (
            ("no loops", {"loops": 0}, ".loops: Input should be greater than or equal to 1, found 0"),
            ("too many loops", {"loops": 65}, ".loops: Input should be less than or equal to 64, found 65"),
            ("half a body", {"body": [1]}, ".body.1: Field required"),
            ("a body of three ends", {"body": [1, 2, 3]}, ".body: Tuple should have at most 2 items"),
            ("a body backwards", {"body": [2, 1]}, ": body: expected first and last layer, from 0, found [2, 1]"),
            ("a sure exit", {"exit": {"threshold": 1}}, ".exit.threshold: Input should be less than 1, found 1"),
            (
                "an unknown exit",
                {"exit": {"rule": "entropy"}},
                ".exit.rule: Input should be 'none', 'hazard' or 'change'",
            ),
            ("unknown entries", {"exited_kv": "copy"}, ".exited_kv: Input should be 'compute', 'last' or 'absent'"),
        )
    ),
)
CHANGES: tuple[tuple[str, Change, str], ...] = (
    *(
        (f"version {value!r:.20}", put("schema_version", value), f"expected 2, found {words}")
        for value, words in VERSIONS
    ),
    *((name, put(place, value), f"{place}: {words}") for name, place, value, words in VALUES),
    *OTHERS,
)
# Names of those that are refused when the bundle is run, not when it is opened.
RUN = ("no logits", "an input that is not there")
