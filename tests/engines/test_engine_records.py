"""Records: what makes another engine, which one fits here, and that nothing damaged or foreign is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import change_manifest, dynexport, error_of, replace_file

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt import inspector
from dynexport.runtime.engines.tensorrt.backend import Backend, BuildTarget, choose_target
from dynexport.runtime.engines.tensorrt.build import recipe_of
from dynexport.runtime.engines.tensorrt.check import Here, check_record, difference, engine_for
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.record import EngineRecord, digest
from dynexport.runtime.engines.tensorrt.shapes import profile_for, profile_shapes
from dynexport.runtime.engines.tensorrt.store import find, stored_engines

ADA = Gpu("Ada card", "8.9", "13.0")
HOPPER = Gpu("Hopper card", "9.0", "13.0")
TURING = Gpu("Turing card", "7.5", "13.0")
NONE = NoGpu("no driver")
VERSION = "1.7.1.116"
RTX = Backend("tensorrt-rtx", None, VERSION, ("7.5", "8.0", "8.9", "12.0"))
FULL = Backend("tensorrt", None, "10.13.0.35", ())


# What decides an engine


def key_of(bundle: Path, backend: Backend = RTX, target: BuildTarget | None = None, **options: Any) -> str:
    opened = Bundle.open(bundle)
    return recipe_of(opened, opened.manifest.graphs[0], backend, target or BuildTarget(("8.0",)), **options).key


def test_the_key_is_of_all_that_decides_an_engine(unbuilt: Path) -> None:
    keys = [key_of(unbuilt)]
    keys.append(key_of(unbuilt, Backend("tensorrt", None, VERSION, ())))
    keys.append(key_of(unbuilt, Backend("tensorrt-rtx", None, "1.7.2.0", RTX.capabilities)))
    keys.append(key_of(unbuilt, target=BuildTarget(("8.0", "8.9"))))
    keys.append(key_of(unbuilt, target=BuildTarget(("8.0",), "A card")))
    keys.append(key_of(unbuilt, plugins=PluginLibrary(source="x", is_module=True, sha256="1" * 64)))
    keys.append(key_of(unbuilt, plugins=PluginLibrary(source="x", is_module=True, sha256="2" * 64)))
    keys.append(key_of(unbuilt, strip=True))
    replace_file(unbuilt, "model.data", (unbuilt / "model.data").read_bytes() + b"\0")
    keys.append(key_of(unbuilt))
    replace_file(unbuilt, "model.onnx", (unbuilt / "model.onnx").read_bytes() + b"\x12\x01x")  # its producer's name
    keys.append(key_of(unbuilt))
    change_manifest(unbuilt, lambda fields: fields["graphs"][0]["profiles"][0]["ranges"].update(B=[1, 2, 4]))
    keys.append(key_of(unbuilt))
    assert len(set(keys)) == len(keys)


def test_what_decides_nothing_leaves_the_key(unbuilt: Path) -> None:
    before = key_of(unbuilt)
    replace_file(unbuilt, "tokenizer.json", b"{}")
    change_manifest(unbuilt, lambda fields: fields["tools"].update(onnx="2.0"))
    assert key_of(unbuilt, plugins=None) == before


def test_an_engine_from_before_weights_could_be_left_out(record: EngineRecord) -> None:
    fields = json.loads(record.model_dump_json())
    assert fields["recipe"].pop("stripped") is False
    older = EngineRecord.model_validate_json(json.dumps(fields))
    assert older == record and older.recipe.key == digest(fields["recipe"])[:16]


# What to build for


@pytest.mark.parametrize(
    ("backend", "wanted", "gpu", "expected"),
    [
        (RTX, None, NONE, BuildTarget(())),
        (RTX, None, ADA, BuildTarget(("8.9",))),
        (RTX, None, HOPPER, BuildTarget(())),
        (RTX, ("12.0", "8.0", "12.0"), ADA, BuildTarget(("8.0", "12.0"))),
        (FULL, None, ADA, BuildTarget(("8.9",), "Ada card")),
        (FULL, ("8.9",), ADA, BuildTarget(("8.9",), "Ada card")),
    ],
)
def test_targets(backend: Backend, wanted: tuple[str, ...] | None, gpu: Gpu | NoGpu, expected: BuildTarget) -> None:
    assert choose_target(backend, wanted, gpu) == expected


@pytest.mark.parametrize(
    ("backend", "wanted", "gpu", "expected"),
    [
        (RTX, ("8.0", "9.0"), ADA, "tensorrt-rtx 1.7.1.116 builds for 7.5, 8.0, 8.9, 12.0; found 9.0"),
        (FULL, None, NONE, r"--backend tensorrt: expected a GPU, found none \(no driver\)"),
        (FULL, ("8.0",), ADA, "tensorrt builds for the GPU here, expected 8.9, found 8.0"),
    ],
)
def test_targets_that_cannot_be_built_for(
    backend: Backend, wanted: tuple[str, ...] | None, gpu: Gpu | NoGpu, expected: str
) -> None:
    with pytest.raises(DynexportError, match=expected):
        choose_target(backend, wanted, gpu)


# Whether an engine fits here


def here(version: str = VERSION, gpu: Gpu | NoGpu = ADA, plugins: str | None = None) -> Here:
    return Here({"tensorrt-rtx": version}, gpu, plugins)


def changed(record: EngineRecord, **fields: Any) -> EngineRecord:
    return record.model_copy(update={"recipe": record.recipe.model_copy(update=fields)})


def test_an_engine_that_fits(record: EngineRecord) -> None:
    check_record(record, here())
    check_record(changed(record, compute_capabilities=()), here(gpu=HOPPER))
    check_record(changed(record, gpu="Ada card"), here())
    check_record(changed(record, plugins_sha256="3" * 64), here(plugins="3" * 64))
    check_record(record, here(plugins="3" * 64))


@pytest.mark.parametrize(
    ("fields", "there", "expected"),
    [
        ({}, here("1.8.0.1"), "built by tensorrt-rtx 1.7.1.116, here is 1.8.0.1"),
        (
            {"backend": "tensorrt"},
            here(),
            "built by tensorrt 1.7.1.116, here is none: pip install 'dynexport[tensorrt]'",
        ),
        ({}, here(gpu=HOPPER), "built for compute capability 8.0, 8.9, here is 9.0 (Hopper card)"),
        (
            {"compute_capabilities": ()},
            here(gpu=TURING),
            "built for compute capability 8.0 and newer, here is 7.5 (Turing card)",
        ),
        ({"gpu": "Other card"}, here(), "built for Other card, here is Ada card"),
        ({}, here(gpu=NONE), "built for compute capability 8.0, 8.9, here is no GPU (no driver)"),
        ({"plugins_sha256": "3" * 64}, here(), "built with plugins 333333333333.., here are no plugins"),
        (
            {"plugins_sha256": "3" * 64},
            here(plugins="4" * 64),
            "built with plugins 333333333333.., here are plugins 444444444444..",
        ),
    ],
)
def test_an_engine_that_does_not_fit(record: EngineRecord, fields: dict[str, Any], there: Here, expected: str) -> None:
    assert difference(changed(record, **fields), there) == expected
    with pytest.raises(DynexportError, match="build another with: dynexport build") as caught:
        check_record(changed(record, **fields), there)
    assert expected in str(caught.value)


def test_the_engine_of_a_graph(built: Path) -> None:
    bundle = Bundle.open(built)
    (graph,) = bundle.manifest.graphs
    stored = engine_for(bundle, graph, here())
    assert len(stored.read()) == stored.record.engine.bytes
    with pytest.raises(
        DynexportError, match=r"1 that cannot run here \(built for compute capability 8.0, 8.9, 12.0, he"
    ):
        engine_for(bundle, graph, here(gpu=HOPPER))
    stored.path.with_suffix(".json").unlink()
    with pytest.raises(DynexportError, match="graph model: expected an engine, found none; build one with: dynexport"):
        engine_for(bundle, graph, here())


# Profiles


def test_shapes_of_profiles(unbuilt: Path) -> None:
    prefill, decode = profile_shapes(Bundle.open(unbuilt).manifest.graphs[0])
    assert prefill["input_ids"] == ((1, 1), (1, 16), (4, 32)) and decode["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert decode["past_key_values.0.key"] == ((1, 2, 64, 16), (1, 2, 64, 16), (4, 2, 64, 16))


def test_the_profile_of_a_step(unbuilt: Path) -> None:
    graph = Bundle.open(unbuilt).manifest.graphs[0]
    assert [profile_for(graph, {"B": 4, "S": size, "K": 9}) for size in (1, 2, 32)] == [1, 0, 0]
    assert profile_for(graph.model_copy(update={"profiles": ()}), {"B": 99}) == 0
    for sizes, expected in (
        ({"B": 5, "S": 1}, "B: expected 1 to 4, which profile prefill was built for, found 5"),
        ({"B": 1, "S": 33}, "S: expected 1 to 32, which profile prefill was built for, found 33"),
    ):
        with pytest.raises(DynexportError, match=expected):
            profile_for(graph, sizes)


# Damage


def files(bundle: Path) -> tuple[Path, Path]:
    (engine,) = (bundle / "engines").glob("*.engine")
    return engine, engine.with_suffix(".json")


def problem(bundle: Path) -> str:
    """What ``inspect`` says of the only engine."""
    ran = dynexport("inspect", bundle, "--engine", "--json", "-")
    assert ran.code == 0 and "Traceback" not in ran.err
    (engine,) = ran.report["engines"]
    return str(engine["problem"])


CHANGES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda r: r.pop("recipe"), "recipe: Field required"),
    (lambda r: r.update(more=1), "more: Extra inputs are not permitted"),
    (lambda r: r["recipe"].update(record_version=2), "recipe.record_version: Input should be 1"),
    (lambda r: r["recipe"].update(backend="../tensorrt"), "recipe.backend: Input should be 'tensorrt' or"),
    (lambda r: r["recipe"].update(backend_version="1\n2"), "recipe.backend_version: String should match"),
    (lambda r: r["recipe"].update(compute_capabilities=["8.0", "x"]), "recipe.compute_capabilities.1: String should"),
    (lambda r: r["engine"].update(sha256="z"), "engine.sha256: String should match"),
    (lambda r: r.update(build_seconds=float("nan")), "build_seconds: Input should be"),
    (lambda r: r.update(build_seconds=-1), "build_seconds: Input should be greater"),
    (lambda r: r["profiles"][0].update(name="\x1b[31m"), "profiles.0.name: Input should be"),
]


@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_a_record_with_other_fields(built: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    _, path = files(built)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    (found,) = stored_engines(Bundle.open(built))
    assert isinstance(found, DynexportError)
    assert (
        f"{path}: {expected}" in str(found)
        and str(found).isprintable()
        and str(found).endswith("build the engine again")
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b" " * (1 << 20) + b"{}"])
def test_a_record_that_is_none(built: Path, content: bytes) -> None:
    _, path = files(built)
    path.write_bytes(content)
    assert str(path) in problem(built)


def test_a_cut_longer_missing_or_linked_engine(built: Path, tmp_path: Path) -> None:
    engine, _ = files(built)
    content = engine.read_bytes()
    for changed_to in (content[:-1], content + b"\0", b""):
        engine.write_bytes(changed_to)
        assert f"expected {len(content)} bytes of sha256 " in problem(built)
    engine.unlink()
    assert problem(built).endswith(".engine: expected an engine, found none; build it again")
    (tmp_path / "elsewhere").write_bytes(content)
    engine.symlink_to(tmp_path / "elsewhere")
    assert "expected an engine, found a link" in problem(built)


def test_an_engine_from_elsewhere_is_not_given_to_tensorrt(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when its record is right in every field: only the user can say that its builder may run programs here."""
    bundle = Bundle.open(built)
    (graph,) = bundle.manifest.graphs
    assert engine_for(bundle, graph, here()).read()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another machine"))
    stored = engine_for(bundle, graph, here())
    for use in (stored.read, lambda: find(bundle, stored.record.recipe)):
        with pytest.raises(
            DynexportError, match=r"\.engine: expected an engine that was built here, found one from els"
        ):
            use()
    stored.check()  # its hash may be looked at
    trusting = Bundle.open(built, trust_engines=True)
    assert engine_for(trusting, graph, here()).read() and find(trusting, stored.record.recipe)


def test_a_place_to_remember_engines_that_cannot_be(
    unbuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    line = error_of(dynexport("build", unbuilt, "--backend", "tensorrt-rtx"))
    assert "expected a place to remember engines that were built here, found: Not a directory; name" in line
    assert not (unbuilt / "engines").exists()


def test_a_record_under_the_name_of_another(built: Path, rtx: Backend) -> None:
    bundle = Bundle.open(built)
    recipe = recipe_of(bundle, bundle.manifest.graphs[0], rtx, BuildTarget(("8.0",)))
    for path in files(built):
        path.rename(path.with_name(f"model-{recipe.key}{path.suffix}"))
    with pytest.raises(DynexportError, match=f"expected the record of engine {recipe.key}, found that of"):
        find(bundle, recipe)


@pytest.mark.parametrize("is_link", [True, False])
def test_engines_that_lead_out_of_the_bundle(unbuilt: Path, tmp_path: Path, is_link: bool) -> None:
    if is_link:
        (tmp_path / "elsewhere").mkdir()
        (unbuilt / "engines").symlink_to(tmp_path / "elsewhere")
    else:
        (unbuilt / "engines").write_text("")
    for arguments in (["build", unbuilt, "--backend", "tensorrt-rtx"], ["inspect", unbuilt, "--engine"]):
        assert "engines: expected a directory of the bundle, found a link or a file; remove it" in error_of(
            dynexport(*arguments)
        )


# Inspecting


def test_inspect_without_engines(unbuilt: Path) -> None:
    ran = dynexport("inspect", unbuilt, "--engine")
    assert (ran.code, ran.err) == (0, "") and "no engines; build some with: dynexport build" in ran.out


def show_on(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | NoGpu) -> None:
    monkeypatch.setattr("dynexport.exporter.cli.engines.find_gpu", lambda: gpu)


def test_inspect_on_a_machine_without_gpu(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show_on(monkeypatch, NONE)
    ran = dynexport("inspect", built, "--engine")
    text = " ".join(ran.out.replace("│", " ").split())
    assert (ran.code, ran.err) == (0, "")
    for words in (
        "built by tensorrt-rtx 1.",
        "built for 8.0, 8.9, 12.0",
        "prefill B 1-4 S 1-32; decode B 1-4 S 1",
        "weights its own",
        "does not run: built for compute capability 8.0, 8.9, 12.0, here is no GPU (no driver)",
        "layers are not shown: only a GPU can load an engine",
    ):
        assert words in text


def test_inspect_an_engine_of_another_version_or_model(built: Path) -> None:
    _, path = files(built)
    content = path.read_text()
    record = json.loads(content)
    here_is = record["recipe"]["backend_version"]
    record["recipe"]["backend_version"] = "1.6.0.3"
    path.write_text(json.dumps(record))
    assert problem(built) == f"does not run: built by tensorrt-rtx 1.6.0.3, here is {here_is}"
    path.write_text(content)
    replace_file(built, "model.data", (built / "model.data").read_bytes() + b"\0")
    assert "does not run: built from weights " in problem(built) and ".., the bundle has " in problem(built)


def test_layers_where_a_gpu_can_take_the_engine(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for TensorRT: there is no GPU to try it on."""
    layers = {"Layers": [{"Name": "norm"}, "attention"]}
    engine = SimpleNamespace(
        create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _: json.dumps(layers))
    )
    show_on(monkeypatch, ADA)
    monkeypatch.setattr(inspector, "Log", lambda trt: SimpleNamespace(logger=None, refusal=lambda: "it is old"))
    trt = SimpleNamespace(
        Runtime=lambda _: SimpleNamespace(deserialize_cuda_engine=lambda content: engine),
        LayerInformationFormat=SimpleNamespace(JSON=0),
    )
    monkeypatch.setattr(inspector, "open_backend", lambda name: Backend(name, trt, VERSION, ()))
    ran = dynexport("inspect", built, "--engine", "--json", "-")
    assert ran.report["engines"][0]["layers"] == ["norm", "attention"]
    engine = None  # type: ignore[assignment]
    assert "refuses the engine: it is old" in problem(built)


def test_plugins_are_hashed_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_plugins").mkdir()
    (tmp_path / "package_of_plugins" / "__init__.py").touch()
    hashes = set()
    for name, content in (("creators.py", ""), ("kernel.cu", "a"), ("kernel.cu", "b")):
        (tmp_path / "package_of_plugins" / name).write_text(content)
        hashes.add(PluginLibrary.from_module("package_of_plugins.creators").sha256)
        assert PluginLibrary.from_module("package_of_plugins").sha256 in hashes
    assert len(hashes) == 3
    library = tmp_path / "library.so"
    library.write_bytes(b"a")
    first = PluginLibrary.from_file(library)
    library.write_bytes(b"b")
    assert first.sha256 != PluginLibrary.from_file(library).sha256
