"""Rows that come and go give in C++ what they give in Python: routes, lengths, overflow, errors and every logit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from forms import CONTEXT, FORMS, HOPS, executor_of
from methods import FlexiDepth, MindSkip, SkipGPT, Stored, write
from mirrored import Mirrored, compare

from dynexport.exporter.bundle.conversion import convert
from dynexport.plugins.cpu_library import CpuLibrary, find_library
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.manifest import PathRouting
from dynexport.runtime.execution.executor import Executor

SCHEDULES, MOVES = 6, 40


class Drawn:
    """A schedule that is drawn at random: mostly what is allowed, now and then what is refused.

    Args:
        seed: gives the same schedule every time.
    """

    def __init__(self, executor: Executor, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        rows, room = int(self.random.integers(2, 7)), int(self.random.integers(1, CONTEXT))
        recorded, grows = self.random.random(2) < (0.3, 0.7)
        self.on = Mirrored(executor, rows, CONTEXT, bool(recorded), room if grows else None)
        self.depths = ["full", *(depth.name for depth in executor.manifest.depths)]
        self.names = 0

    def draw(self, moves: int) -> Mirrored:
        self.on.run("acquire", count=self.pick(range(1, self.on.rows + 1)))
        for _ in range(moves):
            able = [self.prompt, self.decode, self.decode, self.again, self.mark, self.row, self.row_to]
            able += [self.cut, self.copy, self.keep] if self.on.marks else []
            able += [self.put_back] if self.on.saved else []
            self.pick(able)()
        return self.on

    def pick(self, values: Any) -> Any:
        return values[int(self.random.integers(len(values)))]

    def rarely(self, share: float = 0.05) -> bool:
        return bool(self.random.random() < share)

    def some_rows(self, room: int) -> list[int]:
        """Rows in any order, most with room for so many tokens."""
        free = set() if self.rarely() else {*self.on.cache.free}
        able = [row for row in range(self.on.rows) if row not in free]
        able = [row for row in able if self.rarely() or self.on.cache.positions[row] + room <= CONTEXT]
        if not able:
            return []
        return [int(row) for row in self.random.permutation(able)[: self.pick(range(1, len(able) + 1))]]

    def ids(self, count: int) -> list[int]:
        return [int(token) for token in self.random.integers(0, 90 if self.rarely(0.02) else 80, count)]

    def any_depths(self, rows: list[int]) -> list[str]:
        if self.random.random() < 0.4:
            return [self.pick(self.depths)]
        return [self.pick(self.depths) for _ in rows]

    def prompt(self) -> None:
        rows = self.some_rows(9)
        tokens = [self.ids(self.pick(range(1, 10)) if not self.rarely(0.02) else 50) for _ in rows]
        how: dict[str, Any] = {"depths": self.any_depths(rows), "chunk": self.pick([1, 2, 3, 5, 1024])}
        if self.rarely(0.3):
            how |= {"even": True, "chunk": self.pick([8, 12])}
        if self.rarely(0.3):
            how["wanted"] = [
                sorted({int(i) for i in self.random.integers(0, len(ids), self.pick([1, 2, 3]))}) for ids in tokens
            ]
        elif self.rarely(0.5):
            how["wanted"] = "all"
        if self.rarely(0.3):
            how["forced"] = [self.forced(len(ids)) for ids in tokens]
        self.on.run("run", rows=rows, tokens=tokens, phase="prompt", **how)

    def forced(self, count: int) -> list[int]:
        """Decisions of a row's tokens, or none; now and then one that no router can make."""
        routing, size = self.on.executor.manifest.routing, self.on.executor.reader.rows * count
        if self.rarely(0.3):
            return []
        most = 1
        if isinstance(routing, PathRouting):
            most = self.on.executor.manifest.model.layers - (not routing.exit)
        values = self.random.integers(-1, most + 1 + self.rarely(0.1), size)
        return [int(value) for value in values] if size else [1] * self.rarely()

    def decode(self) -> None:
        rows = self.some_rows(1)
        depths = [self.pick(self.depths) for _ in rows]
        if self.random.random() < 0.5:
            rows.sort()
            depths = depths[:1] * len(rows)
        if self.rarely(0.2):
            tokens = [self.ids(self.pick([0, 1, 1])) for _ in rows]
            self.on.run("run", rows=rows, tokens=tokens, phase="decode", depths=depths or ["full"])
        else:
            self.on.run("decode", rows=rows, tokens=self.ids(len(rows)), depths=depths)

    def again(self) -> None:
        """Steps of the same rows at one depth, which are bound once."""
        rows = sorted(self.some_rows(4))
        depths = [self.pick(self.depths)] * len(rows)
        for _ in range(self.pick([2, 3, 4])):
            self.on.run("decode", rows=rows, tokens=self.ids(len(rows)), depths=depths)

    def mark(self) -> None:
        self.names += 1
        row = self.any_row()
        if "error" in self.on.run("mark", row=row, name=f"m{self.names}"):
            return

    def any_row(self) -> int:
        return int(self.random.integers(-1, self.on.rows + 1) if self.rarely() else self.pick(range(self.on.rows)))

    def row(self) -> None:
        what = self.pick(["release", "rewind", "acquire", "acquire"])
        if what == "acquire":
            self.on.run("acquire", count=self.pick([1, 1, 2]))
        elif self.rarely(0.4):
            self.on.run(what, row=self.any_row())

    def row_to(self) -> None:
        self.on.run("move", row=self.any_row(), target=self.any_row())

    def any_mark(self) -> str:
        return str(self.pick([*self.on.marks]))

    def cut(self) -> None:
        mark = self.any_mark()
        self.on.run("truncate", row=self.any_row() if self.rarely() else self.on.marks[mark].row, mark=mark)

    def copy(self) -> None:
        self.on.run("copy_prefix", mark=self.any_mark(), target=self.any_row())

    def keep(self) -> None:
        """Save what a row holds beyond a mark that it still has."""
        name = self.any_mark()
        mark, cache = self.on.marks[name], self.on.cache
        if mark.position <= cache.positions[mark.row] and (mark.lengths <= cache.lengths[:, mark.row]).all():
            self.names += 1
            self.on.run("save", row=mark.row, mark=name, name=f"s{self.names}")

    def put_back(self) -> None:
        self.on.run("restore", row=self.any_row(), name=self.pick([*self.on.saved]))


# Beside those that all tests share: what else a bundle may ask of a runtime.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense-fp16": ("dense", {"precision": "fp16"}),
    "dense-tied-int4": ("dense-tied-mqa", {"precision": "int4"}),
    "skip-int8": ("skip-keep", {"precision": "int8"}),
    "early-exit": ("early-exit-prompt-full", {}),
    "early-exit-static": ("early-exit-prompt-exit", {"static": True}),
    "mod-fp16": ("mod-sigmoid-replace", {"precision": "fp16"}),
    "mod-topk": ("mod-topk", {}),
    "mod-topk-padded": ("mod-topk-ceil-normed", {"static": True}),
    "mod-compact": ("mod-compact", {"fields": {"cache": {"capacity": 0.25}}}),
    "mod-full-is-an-error": ("mod-router", {"fields": {"cache": {"capacity": 0.2, "overflow": "error"}}}),
    "radial-gated-fp16": ("radial-gated-noexit", {"precision": "fp16"}),
    "radial-noreuse": ("radial-noreuse-min", {}),
    "radial-single-half": ("radial-step", {"fields": HOPS, "layer_capacity": 0.5}),
    "dense-operators-int4": ("dense", {"precision": "int4", "plugins": True}),
    "skip-operators-bf16": ("skip-keep", {"precision": "bf16", "plugins": True}),
    "mod-operators-int8": ("mod-router", {"precision": "int8", "plugins": True}),
    "radial-operators-fp16": ("radial-step", {"precision": "fp16", "plugins": True}),
    "radial-operators-fp32": ("radial-own-routers", {"precision": "fp32", "plugins": True}),
}
# Checkpoints of other code, of which tokens skip parts of layers.
IMPORTED: dict[str, tuple[Callable[[], Stored], dict[str, Any]]] = {
    "flexidepth": (FlexiDepth.stored, {}),
    "flexidepth-operators-int4": (FlexiDepth.stored, {"precision": "int4", "plugins": True}),
    "skipgpt-int8": (SkipGPT.stored, {"precision": "int8"}),
    "mindskip": (MindSkip.stored, {}),
}


def opened(form: str, home: Path) -> Executor:
    if form in FORMS:
        return executor_of(form)
    if form in IMPORTED:
        stored, how = IMPORTED[form]
        source = write(home / "model", stored())
    else:
        case, how = OTHERS[form]
        source = CONFORMANCE / case
    convert(source, home / "bundle", max_length=CONTEXT, golden=False, **how)
    return Executor(Bundle.open(home / "bundle"), threads=1)


@pytest.mark.parametrize("form", IMPORTED)
def test_tokens_that_skip_parts_of_layers(form: str, run: Callable[..., Any], tmp_path: Path) -> None:
    executor = opened(form, tmp_path)
    schedules = [Drawn(executor, seed).draw(MOVES // 2) for seed in range(SCHEDULES // 2)]
    told = [each for schedule in schedules for each in schedule.told]
    assert sum("found" in each for each in told) > len(told) / 3, "most are refused"
    assert sum(len(schedule.logits) for schedule in schedules) > 4 * SCHEDULES
    compare(run, schedules, tmp_path)


@pytest.mark.parametrize("form", [*FORMS, *OTHERS])
def test_random_schedules(form: str, run: Callable[..., Any], tmp_path: Path) -> None:
    if "operators" in form:
        assert isinstance(find_library(), CpuLibrary), "make cpp builds it, and C++ is told of it"
    executor = opened(form, tmp_path)
    schedules = [Drawn(executor, seed).draw(MOVES) for seed in range(SCHEDULES)]
    told = [told for schedule in schedules for told in schedule.told]
    assert sum("found" in each for each in told) > len(told) / 3, "most are refused"
    assert sum(len(schedule.logits) for schedule in schedules) > 8 * SCHEDULES
    routed = [told["error"] for told in told if "route" in told]
    assert bool(routed) == (form == "mod-full-is-an-error")
    compare(run, schedules, tmp_path)


@pytest.mark.parametrize(
    "form", ["skip", "skip-plugins", "mod", "mod-full-is-an-error", "radial-step", "radial-layer", "radial-single-step"]
)
def test_the_first_tokens_of_a_run_are_kept(form: str, run: Callable[..., Any], tmp_path: Path) -> None:
    on, random = Mirrored(opened(form, tmp_path), 3, CONTEXT, record=form == "mod"), np.random.default_rng(5)
    on.run("acquire", count=3)
    on.run("run", rows=[0, 1, 2], tokens=[[1, 2], [3, 4, 5], [6]], phase="prompt", depths=["full"])
    for _ in range(12):
        row, size = int(random.integers(3)), int(random.integers(1, 6))
        tokens, kept = random.integers(0, 80, size).tolist(), int(random.integers(1, size + 1))
        on.run("drafted", row=row, tokens=tokens, kept=kept, depths=["full"])
        on.run("decode", rows=[0, 1, 2], tokens=[7, 8, 9], depths=["full"] * 3)
    assert sum("found" in told for told in on.told) > 14
    compare(run, [on], tmp_path)


# Wrong calls: after three rows were acquired, of which two hold tokens, and marks were made.
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "acquire beyond": ("acquire", {"count": 2}, "cache: expected 2 free of 4 rows, found 1; release one"),
    "acquire none": ("acquire", {"count": 0}, "rows: expected at least 1, found 0"),
    "release a free row": ("release", {"row": 3}, "cache: row 3: expected one that is acquired, found it free"),
    "release beyond": ("release", {"row": 4}, "row: expected 0..3, found 4"),
    "release before": ("release", {"row": -1}, "row: expected 0..3, found -1"),
    "rewind a free row": ("rewind", {"row": 3}, "cache: row 3: expected one that is acquired"),
    "mark a free row": ("mark", {"row": 3, "name": "m"}, "cache: row 3: expected one that is acquired"),
    "truncate beyond": ("truncate", {"row": 0, "mark": "beyond"}, "cache: row 0: expected a mark within its 3 tokens"),
    "truncate another row": ("truncate", {"row": 0, "mark": "other"}, "cache: row 0: expected a mark of its own"),
    "truncate to an earlier text": (
        "truncate",
        {"row": 0, "mark": "earlier"},
        "cache: row 0: expected a mark of this text, found one of an earlier text",
    ),
    "truncate a free row": ("truncate", {"row": 3, "mark": "mine"}, "cache: row 3: expected one that is acquired"),
    "copy beyond": ("copy_prefix", {"mark": "beyond", "target": 2}, "cache: row 0: expected a mark within its 3"),
    "copy into a full row": ("copy_prefix", {"mark": "mine", "target": 1}, "cache: row 1: expected an empty row to"),
    "copy into a free row": ("copy_prefix", {"mark": "mine", "target": 3}, "cache: row 3: expected one that is"),
    "move a free row": ("move", {"row": 3, "target": 2}, "cache: row 3: expected one that is acquired"),
    "move to an acquired row": ("move", {"row": 0, "target": 1}, "cache: row 1: expected a free row to move to"),
    "move beyond": ("move", {"row": 0, "target": 4}, "row: expected 0..3, found 4"),
    "restore elsewhere": ("restore", {"row": 1, "name": "saved"}, "cache: row 1: expected a row of 3 tokens to append"),
    "run a free row": ("run", {"rows": [3], "tokens": [[1]]}, "cache: row 3: expected one that is acquired"),
    "run a row twice": ("run", {"rows": [0, 0], "tokens": [[1], [2]]}, "rows: expected each row of a batch once"),
    "run too few tokens": ("run", {"rows": [0, 1], "tokens": [[1]]}, "prompts: expected 2, one for each row, found 1"),
    "run an empty prompt": ("run", {"rows": [0], "tokens": [[]]}, "prompt: expected at least one token, found none"),
    "run an unknown token": ("run", {"rows": [0], "tokens": [[89]]}, "prompt: expected token ids 0..88, found 89"),
    "run a negative token": ("run", {"rows": [0], "tokens": [[-1]]}, "prompt: expected token ids 0..88, found -1"),
    "run no chunk": ("run", {"rows": [0], "tokens": [[1]], "chunk": 0}, "chunk: expected at least 1, found 0"),
    "run too few depths": (
        "run",
        {"rows": [0, 1, 2], "tokens": [[1], [2], [3]], "depths": ["full", "2"]},
        "depth: expected 3, one for each row, found 2",
    ),
    "run too few forced": (
        "run",
        {"rows": [0, 1], "tokens": [[1], [2]], "forced": [[]]},
        "forced: expected 2, one for each row, found 1",
    ),
    "run forced": ("run", {"rows": [0], "tokens": [[1]], "forced": [[1]]}, "forced: expected None, as"),
    "run places beyond": (
        "run",
        {"rows": [0], "tokens": [[1, 2]], "wanted": [[2]]},
        "logits_at: expected 0..1, found 2",
    ),
    "run places that fall": (
        "run",
        {"rows": [0], "tokens": [[1, 2]], "wanted": [[1, 0]]},
        "logits_at: expected ascending places, found [1, 0]",
    ),
    "run beyond the context": (
        "run",
        {"rows": [1, 0], "tokens": [[1], [1] * 38], "phase": "decode"},
        "tokens: expected at most 37 tokens to fit the context of 40, found 38",
    ),
    "decode a free row": ("decode", {"rows": [2, 3], "tokens": [1, 1]}, "cache: row 3: expected one"),
    "decode a row twice": ("decode", {"rows": [1, 1], "tokens": [1, 1]}, "rows: expected each row of a batch once"),
    "decode too few": ("decode", {"rows": [0, 1], "tokens": [1]}, "tokens: expected 2, one for each row, found 1"),
    "decode no row": ("decode", {"rows": [], "tokens": []}, "rows: expected at least one, found none"),
    "decode an unknown token": ("decode", {"rows": [0], "tokens": [89]}, "tokens: expected token ids 0..88, found 89"),
}


def test_wrong_calls(run: Callable[..., Any], tmp_path: Path) -> None:
    """Each is told in Python's words and changes nothing."""
    on = Mirrored(executor_of("skip"), 4, CONTEXT, record=True)
    on.run("acquire", count=3)
    on.run("mark", row=0, name="earlier")
    on.run("rewind", row=0)
    on.run("run", rows=[0, 1], tokens=[[1, 2, 3], [4, 5]], phase="prompt", depths=["full"])
    on.run("mark", row=0, name="mine")
    on.run("mark", row=1, name="other")
    on.run("run", rows=[0], tokens=[[6, 7]], phase="prompt", depths=["full"])
    on.run("mark", row=0, name="beyond")
    on.run("save", row=0, mark="mine", name="saved")
    on.run("truncate", row=0, mark="mine")
    on.run("run", rows=[0], tokens=[[6]], phase="prompt", depths=["full"])
    on.run("truncate", row=0, mark="mine")
    before = on.state()
    for name, (op, how, words) in WRONG.items():
        if op == "run":
            how = {"phase": "prompt", "depths": ["full"], **how}
        elif op == "decode":
            how = {"depths": ["full"] * len(how["rows"]), **how}
        told = on.run(op, **how)
        assert told.get("error", "none").startswith(words), (name, told)
        assert told["state"] == before, name
    compare(run, [on], tmp_path)


@pytest.mark.parametrize("form", ["skip-static", "mod", "radial-layer", "radial-single-step"])
def test_threads_that_share_an_executor(form: str, run: Callable[..., Any]) -> None:
    """Each with its own cache; the first of them to come loads the graphs."""
    threads, steps = 4, 12
    ran = run("probe_threads", executor_of(form).bundle.path, threads, steps)
    assert (ran.returncode, ran.stdout.decode()) == (0, f"{threads * 2 * (1 + steps)} of {threads * 2 * (1 + steps)}\n")
