"""Decode a bundle by its manifest alone: what docs/bundle.md says, as a program. It imports nothing of dynexport."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array, Json = np.ndarray, dict[str, Any]
DTYPES = {name: np.dtype(name) for name in ("float16", "int8", "int32", "int64", "bool")} | {"float": np.float32}
PAST, PRESENT = "past_key_values.", "present."


class Bundle:
    """The manifest, and the graphs that it names, each loaded when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.engines, self.sessions = directory, dict[str, Engine](), dict[str, Any]()
        self.manifest: Json = json.loads((directory / "manifest.json").read_text())
        if self.manifest["schema_version"] != 2:
            raise ValueError(f"schema_version: expected 2, found {self.manifest['schema_version']}")
        for name, file in self.manifest["files"].items():
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != file["sha256"]:
                raise ValueError(f"{name}: expected the content whose hash the manifest has, found another")

    def engine(self, name: str) -> Engine:
        if name not in self.engines:
            graph = next(graph for graph in self.manifest["graphs"] if graph["name"] == name)
            found = self.sessions.get(graph["file"]) or session(self.directory / graph["file"], graph)
            self.sessions[graph["file"]], self.engines[name] = found, Engine(found, graph)
        return self.engines[name]

    def program(self, phase: str, depth: str) -> WholeStep | GraphSet:
        """The program for this depth, else the one for every depth."""
        programs = {program["depth"]: program for program in self.manifest["programs"] if program["phase"] == phase}
        program = programs[depth if depth in programs else None]
        return GraphSet(self, program["set"]) if program["set"] else WholeStep(self, self.engine(program["graph"]))


class Caches:
    """The buffers of every place, and how much of them each row uses."""

    def __init__(self, manifest: Json, rows: int, tokens: int) -> None:
        self.buffers: dict[str, Array] = {}
        self.lengths = np.zeros((len(manifest["caches"]), rows), np.int64)  # entries in every place
        self.positions = np.zeros(rows, np.int64)  # tokens seen: the next one's position
        self.slots = np.zeros((len(manifest["caches"]), 1), np.int64)
        for cache in manifest["caches"]:
            slots = min(tokens, cache["most"] or tokens) * cache["per_token"] + cache["slack"]
            for name, part in cache["parts"].items():
                shape = [{"B": rows, "M": slots}.get(size, size) for size in part["shape"]]
                self.buffers[f"{cache['place']}.{name}"] = np.zeros(shape, DTYPES[part["dtype"]])
            self.slots[cache["place"]] = self.buffers[f"{cache['place']}.key"].shape[2]


def session(path: Path, graph: Json) -> Any:
    """A session of one file, which may be several graphs'."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level, options.enable_mem_reuse = 1, 4, graph["share_memory"]
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Engine:
    """One graph: a session's, or a part of it."""

    def __init__(self, session: Any, graph: Json) -> None:
        self.graph, self.session, self.others = graph, session, dict[str, Array]()
        own = {spec["name"] for spec in graph["inputs"]}
        for node in (node for node in session.get_inputs() if node.name not in own):
            shape, dtype = [size if isinstance(size, int) else 0 for size in node.shape], node.type[len("tensor(") : -1]
            self.others[node.name] = np.zeros(shape, DTYPES[dtype])
        if graph["part"] is not None:
            self.others["part"][...] = graph["part"]

    def run(self, inputs: Json, caches: Caches | None = None, rows: slice = slice(0), place: str = "") -> Json:
        """Run once; some rows of the caches are read and written in place. A set's attention is told which place."""
        binding = self.session.io_binding()
        results = [spec["name"] for spec in self.graph["outputs"] if not spec["name"].startswith(PRESENT)]
        for name in results:
            binding.bind_output(name)
        for name, dtype in ((spec["name"], DTYPES[spec["dtype"]]) for spec in self.graph["inputs"]):
            if caches and name.startswith(PAST):
                buffer = ort.OrtValue.ortvalue_from_numpy(caches.buffers[place + name.removeprefix(PAST)][rows])
                binding.bind_ortvalue_input(name, buffer)
                binding.bind_ortvalue_output(name.replace(PAST, PRESENT), buffer)
            else:
                binding.bind_cpu_input(name, np.array(inputs[name], dtype))
        for name, empty in self.others.items():
            binding.bind_cpu_input(name, empty)
        self.session.run_with_iobinding(binding)
        return {name: value.numpy() for name, value in zip(results, binding.get_outputs(), strict=False)}


class WholeStep:
    """A graph that is a whole step."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.engine, self.model = engine, bundle.manifest["model"]
        self.routing: Json = bundle.manifest["routing"] or {"kind": "none"}

    def run(self, caches: Caches, tokens: dict[int, list[int]], active: Array, phase: str) -> Array:
        """Run new tokens of some rows, and count what that adds; [rows, vocab], the logits of each row's last token."""
        rows = slice(min(tokens), max(tokens) + 1)
        given = [tokens.get(row, []) for row in range(rows.start, rows.stop)]
        counts, length = np.array([len(ids) for ids in given]), max(map(len, given))
        positions = caches.positions[rows, None] + np.arange(length)
        inputs = {
            "input_ids": [ids + [0] * (length - len(ids)) for ids in given],
            "position_ids": np.minimum(positions, self.model["max_length"] - 1),
            "cache_lengths": caches.lengths[self.engine.graph["places"], rows],
            "layer_active": active[self.engine.graph["layers"]],
            "logits_indices": np.maximum(counts - 1, 0)[:, None],
            "token_counts": counts,
            "is_prompt": phase == "prompt",
            "forced_routes": np.full((len(self.routing.get("layers", ())), len(given), length), -1),
            "forced_paths": np.full((self.routing.get("hops", 0), len(given), length), -1),
        }
        results = self.engine.run(inputs, caches, rows)
        caches.lengths[:, rows] += self.entries(results, counts, active)
        caches.positions[rows] += counts
        return results["logits"][counts > 0, 0]

    def entries(self, results: Json, counts: Array, active: Array) -> Array:
        """[places, rows], what a call has added to every cache."""
        if self.routing["kind"] == "paths":
            paths, layers = results["paths"], np.arange(self.model["layers"])
            if self.routing["places"] == "hops":
                return np.isin(paths, layers).sum(axis=2)
            return (paths == layers[:, None, None, None]).sum(axis=(1, 3))
        added = active[:, None] * counts
        if self.routing["kind"] == "layers":
            if self.routing["overflow"] == "error" and results["overflow"].any():
                raise ValueError("expected room in the caches of routed layers, found one full")
            added[self.routing["layers"]] = results["routes"].sum(axis=2)
        return added


class GraphSet:
    """Graphs that make a step together: hop by hop, every token goes through the layer that its router chose."""

    def __init__(self, bundle: Bundle, names: Json) -> None:
        self.routing, self.layers = bundle.manifest["routing"], bundle.manifest["model"]["layers"]
        lists = {part: [found] if isinstance(found, str) else found for part, found in names.items()}
        self.engines = {part: [bundle.engine(name) for name in found] for part, found in lists.items()}

    def run(self, caches: Caches, tokens: dict[int, list[int]], active: Array, phase: str) -> Array:
        """As for a whole step. Rows come one after the other here, but one line could hold the tokens of all."""
        return np.stack([self.run_row(caches, row, np.array(ids)) for row, ids in tokens.items()])

    def run_row(self, caches: Caches, row: int, ids: Array) -> Array:
        """[vocab], the logits of the last of a row's N tokens."""
        positions = caches.positions[row] + np.arange(len(ids))
        line = self.engines["embedding"][0].run({"input_ids": ids[None], "position_ids": positions[None]})
        line |= {"hidden_states": line["hidden_states_out"], "position_ids": positions[None]}
        tokens, visited = np.arange(len(ids)), np.zeros((len(ids), self.layers + self.routing["exit"]), bool)
        for hop, router in enumerate(self.engines["routers"]):
            allowed = ~visited[tokens] | self.routing["reuse"]
            allowed[:, self.layers :] = hop >= self.routing["min_hops"]
            tokens, allowed = tokens[allowed.any(axis=1)], allowed[allowed.any(axis=1)]
            if not len(tokens):
                break
            inputs = {"hidden_states": line["hidden_states"][:, tokens], "allowed": allowed}
            answer = router.run(inputs | {"forced_choices": np.full(len(tokens), -1)})
            stays = answer["choices"] < self.layers
            tokens, choices = tokens[stays], answer["choices"][stays]
            visited[tokens, choices] = True
            if len(tokens):
                self.hop(caches, row, hop, line, tokens, choices, answer.get("probabilities", stays)[stays])
        caches.positions[row] += len(ids)
        return self.engines["head"][0].run({"hidden_states": line["hidden_states"][:, -1:]})["logits"][0, 0]

    def hop(self, caches: Caches, row: int, hop: int, line: Json, tokens: Array, choices: Array, gates: Array) -> None:
        """Run every token's layer; tokens of all layers meet in attention, unless a cache is a layer's own."""
        of_layers, attend = [(each, choices == each) for each in np.unique(choices)], self.engines["attention"][0].run
        found: Json = {"position_ids": line["position_ids"][:, tokens]}
        for layer, group in of_layers:
            inputs = {name: line[name][:, tokens[group]] for name in ("hidden_states", "cos", "sin") if name in line}
            for name, values in self.engines["before_attention"][layer].run(inputs).items():
                found.setdefault(name, np.zeros((1, len(tokens), values.shape[2]), values.dtype))[:, group] = values
        attended = np.zeros_like(found["query"])
        places = choices if self.routing["places"] == "layers" else np.full(len(tokens), hop)
        for place in np.unique(places):
            group, before = places == place, caches.lengths[place, row].copy()
            after = caches.lengths[place, row] = before + group.sum()
            inputs = {name: values[:, group] for name, values in found.items()}
            inputs |= {"cache_lengths": [before], "last_index": [after - 1], "total_length": after, "step": hop}
            attended[:, group] = attend(inputs, caches, slice(row, row + 1), f"{place}.")["attention"]
        for layer, group in of_layers:
            inputs = {"hidden_states": line["hidden_states"][:, tokens[group]], "attention": attended[:, group]}
            results = self.engines["after_attention"][layer].run(inputs | {"gates": gates[group]})
            line["hidden_states"][:, tokens[group]] = results["hidden_states_out"]


class Runner:
    """Runs new tokens of a batch's rows, call by call."""

    def __init__(self, directory: Path, rows: int, tokens: int, chunk: int = 1024) -> None:
        self.bundle, self.chunk = Bundle(directory), chunk
        self.caches = Caches(self.bundle.manifest, rows, tokens)

    def feed(self, phase: str, depth: str, tokens: list[list[int]]) -> Array:
        """Run each row's new tokens, none of some; float32 [rows, vocab], the logits of each one's last."""
        layers, vocabulary = (self.bundle.manifest["model"][size] for size in ("layers", "vocab_size"))
        which = "prompt" if phase == "prompt" else "keep"
        kept = {found["name"]: found[which] for found in self.bundle.manifest["depths"]}
        active, program = np.isin(range(layers), kept.get(depth, range(layers))), self.bundle.program(phase, depth)
        logits = np.zeros((len(tokens), vocabulary), np.float32)
        for pieces in self.calls({row: ids for row, ids in enumerate(tokens) if ids}):
            logits[list(pieces)] = program.run(self.caches, pieces, active, phase)
        return logits

    def calls(self, tokens: dict[int, list[int]]) -> Iterator[dict[int, list[int]]]:
        """Cut new tokens into calls: all rows together where the limits allow that, else row by row, in pieces."""
        limits, caches = self.bundle.manifest["limits"], self.caches
        rows, longest = range(min(tokens), max(tokens) + 1), max(map(len, tokens.values()))
        most = min(size for size in (self.chunk, limits["prompt"], limits["tokens"], longest) if size)
        most = longest if limits["whole_prompts"] else most
        alike = longest == 1 or (limits["together"] != "never" and not caches.positions[rows].any())
        full = (caches.lengths >= caches.slots).any(axis=0)
        fits = longest <= most and len(rows) <= (limits["rows"] or len(rows))
        if alike and fits and not any(full[row] for row in rows if row not in tokens):
            yield tokens
            return
        for row, ids in tokens.items():
            while ids:
                count = min(most, limits["filled"] or most) if caches.positions[row] else most
                yield {row: ids[:count]}
                ids = ids[count:]
