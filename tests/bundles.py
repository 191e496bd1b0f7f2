"""Bundles of the smallest checkpoints, the command line in this process, and ways to damage both."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from dynexport.exporter.bundle.conversion import convert

CONFORMANCE = Path(__file__).parent / "conformance"
SPECIAL = ("<|im_start|>", "<|im_end|>")
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + ':' + message.content + '<|im_end|>' }}"
    "{% endfor %}{{ '<|im_start|>assistant:' if add_generation_prompt }}"
)


@dataclass(frozen=True)
class Ran:
    """What a command did: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        """The whole of standard output as JSON."""
        return json.loads(self.out)


def dynexport(*arguments: object, stdin: str | bytes = "") -> Ran:
    """Run a command as ``dynexport ARGUMENTS`` does, in this process."""
    from dynexport.exporter.cli.main import main  # most tests need no command line

    out, err = io.StringIO(), io.StringIO()
    earlier = sys.argv, sys.stdin, signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryFile() if stdin else Path(os.devnull).open("rb") as file:
        if stdin:
            file.write(stdin if isinstance(stdin, bytes) else stdin.encode())
            file.seek(0)
        sys.argv, sys.stdin = ["dynexport", *map(str, arguments)], io.TextIOWrapper(file)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                main()
        finally:
            sys.argv, sys.stdin = earlier[:2]
            signal.signal(signal.SIGTERM, earlier[2])
    assert isinstance(ended.value.code, int)
    return Ran(ended.value.code, out.getvalue(), err.getvalue())


def error_of(ran: Ran) -> str:
    """The one line that a refused command leaves."""
    assert ran.code == 2, ran
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), ran.err
    assert "Traceback" not in ran.err and "bug in dynexport" not in ran.err, ran.err
    return lines[0]


def checkpoint(directory: Path, case: str = "skip-2x", **fields: Any) -> Path:
    """A checkpoint of the conformance set, its config changed; None removes a field."""
    shutil.copytree(CONFORMANCE / case, directory)
    config = json.loads((directory / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def talking_checkpoint(directory: Path, case: str = "skip-2x", template: str = CHAT, **fields: Any) -> Path:
    """The same with a tokenizer of single characters and a chat template; the last two ids are special."""
    checkpoint(directory, case, **fields)
    size = json.loads((directory / "config.json").read_text())["vocab_size"] - len(SPECIAL)
    characters = [*"\n", *map(chr, range(32, 32 + size - 1))]
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, [], fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(template)
    return directory


def change_tensors(directory: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change a checkpoint's tensors in place."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest in place, its hashes left as they are."""
    path = bundle / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Another content for a file of a bundle, with a manifest that agrees."""
    (bundle / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change_manifest(bundle, lambda fields: fields["files"].update({name: entry}))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def copied(bundle: Path, directory: Path) -> Path:
    """A copy of a bundle to damage."""
    return Path(shutil.copytree(bundle, directory))


def environment(**variables: str) -> dict[str, str]:
    """For a subprocess: this process's, and no torch where that is not what is tested."""
    return {**os.environ, "PYTHONWARNINGS": "ignore", **variables}


def command(*arguments: object) -> Sequence[str]:
    """``dynexport ARGUMENTS`` for a subprocess."""
    return [str(Path(sys.executable).with_name("dynexport")), *map(str, arguments)]


@pytest.fixture(scope="session")
def skip_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unified Skip: 8 layers, the ratio 2 keeps 0, 2, 4 and 7; a tokenizer, a chat template, 89 tokens, context 256."""
    home = tmp_path_factory.mktemp("skip")
    convert(talking_checkpoint(home / "model"), home / "bundle", golden=False)
    return home / "bundle"


@pytest.fixture(scope="session")
def ids_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without tokenizer, with a second ratio and a context of 24."""
    home = tmp_path_factory.mktemp("ids")
    convert(CONFORMANCE / "skip-2x", home / "bundle", speedups=[2, 1.5], max_length=24, golden=False)
    return home / "bundle"


@pytest.fixture(scope="session")
def dense_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense: 4 layers, no tokenizer."""
    home = tmp_path_factory.mktemp("dense")
    convert(CONFORMANCE / "dense", home / "bundle", golden=False)
    return home / "bundle"
