"""The documentation is true: its tables come from the code, its links lead somewhere, its commands run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "samples").rglob("*.md")])
TEXT = (
    "Once upon a time the river had been rising since morning, and by noon the lower fields were under water. "
    "Nobody in the village was surprised: it happened every spring, and every spring the old bridge held. "
)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `dynexport ..` line, in order."""
    lines = [line.removeprefix("$ ") for block in blocks(page, "console", "bash") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("dynexport ")]


def run_python(code: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the code prints, run as a module of its own."""
    capsys.readouterr()
    exec(compile(code, "<docs>", "exec"), {"__name__": "docs"})
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "script", ["docs_bundle", "docs_families", "docs_faults", "docs_fields", "docs_limits", "docs_triton"]
)
def test_tables_come_from_the_code(script: str) -> None:
    module = importlib.import_module(script)
    assert module.PAGE.read_text() == module.page(), f"run: python samples/{script}.py"


def test_pictures_come_from_the_code() -> None:
    import docs_pictures

    for name, content in docs_pictures.pictures().items():
        assert (docs_pictures.IMAGES / name).read_text() == content, "run: python samples/docs_pictures.py"


def test_the_picture_of_the_house_comes_from_its_imports() -> None:
    import docs_architecture

    content = docs_architecture.PICTURE.read_text()
    assert content == docs_architecture.picture(), "run: python samples/docs_architecture.py"


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {link}"


@pytest.mark.parametrize("target", ["demo", "docs", "test", "test-page", "test-triton", "gpu-check"])
def test_make_targets_resolve(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def save_tokenizer(directory: Path, vocabulary: int) -> None:
    """A small byte-level tokenizer, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with what the README supposes, ``./model``, ``book.txt`` and our samples, to be in."""
    pytest.importorskip("torch")
    from tiny_models import FAMILIES, save_model

    directory = tmp_path_factory.mktemp("readme")
    config = {"num_hidden_layers": 6, "max_position_embeddings": 512, "vocab_size": 300}
    save_model(directory / "model", "llama", {**FAMILIES["llama"], **config})
    save_tokenizer(directory / "model", config["vocab_size"])
    (directory / "book.txt").write_text(TEXT * 8)
    body = {"model": "bundle", "prompt": "Once upon a time", "max_tokens": 4}
    request = {"custom_id": "one", "method": "POST", "url": "/v1/completions", "body": body}
    (directory / "requests.jsonl").write_text(json.dumps(request) + "\n")
    (directory / "samples").symlink_to(ROOT / "samples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield directory


def test_readme_shows_every_command() -> None:
    from dynexport.exporter.cli.main import cli

    assert {arguments[0] for arguments in commands(ROOT / "README.md")} == set(cli.commands)


def needs_gpu(arguments: list[str]) -> bool:
    """Engines are built anywhere."""
    return arguments[0] == "gpu-check" or (arguments[0] != "build" and "--backend" in arguments)


def serves(arguments: list[str]) -> None:
    """Start a server at a free port, ask whether it is ready, and stop it."""
    command = [sys.executable, "-m", "dynexport", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline()
            with urlopen(f"{said.split()[-1]}/ready", timeout=10) as response:
                assert response.status == 200
            process.terminate()
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_readme_commands_run(workplace: Path) -> None:
    from dynexport.exporter.cli.main import cli

    for arguments in commands(ROOT / "README.md"):
        if needs_gpu(arguments):
            cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
            continue
        if arguments[0] == "serve":
            serves(arguments)
            continue
        code = cli.main(arguments, prog_name="dynexport", standalone_mode=False)
        assert not code, f"{shlex.join(arguments)}: exit code {code}"


def test_readme_python_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks(ROOT / "README.md", "python")
    assert run_python(snippet, capsys)


def test_a_runtime_can_be_written_from_the_bundle_page(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dynexport.exporter import convert
    from dynexport.runtime import Bundle, Model

    convert("model", "bundle", strategy="unified-skip", speedups=[2, 3], golden=False)
    (snippet,) = blocks(ROOT / "docs" / "bundle.md", "python")
    printed = run_python(snippet, capsys)
    ids = Model(Bundle.open("bundle"), 2).generate([[5, 17, 42]], depth=2, max_new_tokens=16)[0].ids
    assert printed.strip().startswith(str(ids).rstrip("]"))


def test_every_field_of_a_request_is_documented() -> None:
    from dynexport.runtime.serving.http.protocol import ChatBody, CompletionBody

    text = (ROOT / "docs/serving.md").read_text()
    section = text[text.index("## Fields") : text.index("## Errors")]
    documented = set(re.findall(r"`(\w+)`", section))
    fields = set(ChatBody.model_fields) | set(CompletionBody.model_fields)
    assert fields - documented == set()
