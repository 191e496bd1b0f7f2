"""The deployment files agree with the command line and the app: options, ports, paths, and times to stop."""

from __future__ import annotations

import configparser
import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from bundles import environment
from house import FOLDERS, ROOT

from dynexport.exporter.cli.serve import serve
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.served import Directory
from dynexport.runtime.serving.http.settings import HttpSettings

DEPLOY = ROOT / "samples" / "deploy"
# Most seconds that the server takes after its drain.
LAST = 10
DOCKERFILE = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")


def instruction(name: str, form: str = "[") -> list[str]:
    """Return the words of an instruction of the image's last stage that is written as JSON."""
    stage = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    (found,) = re.findall(rf"^{name} .*?(\[.*\])$", stage, re.MULTILINE)
    words: list[str] = json.loads(found)
    return words


def options(words: list[str]) -> Mapping[str, Any]:
    """Return the options of a command line of `dynexport serve`, parsed by it."""
    assert words[:2] == ["dynexport", "serve"]
    return serve.make_context("serve", words[2:]).params


def unit() -> configparser.ConfigParser:
    text = (DEPLOY / "dynexport.service").read_text().replace("\\\n", " ")
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


def manifest(kind: str) -> Any:
    (found,) = (each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if each["kind"] == kind)
    return found


def container() -> Any:
    (found,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return found


COMMANDS = {
    "Dockerfile": [*instruction("ENTRYPOINT"), *instruction("CMD")],
    "kubernetes.yaml": [*instruction("ENTRYPOINT"), *container()["args"]],
    "dynexport.service": ["dynexport", *shlex.split(unit()["Service"]["ExecStart"])[1:]],
}


@pytest.mark.parametrize("file", COMMANDS)
def test_the_command_line_is_one_of_dynexport_serve(file: str) -> None:
    found = options(COMMANDS[file])
    assert len(found["bundles"]) == 1 and found["bundles"][0].is_absolute()
    assert found["port"] == 8000
    assert found["host"] == ("127.0.0.1" if file == "dynexport.service" else "0.0.0.0")


def test_an_unknown_option_would_be_found() -> None:
    with pytest.raises(click.NoSuchOption):
        options([*COMMANDS["Dockerfile"], "--max-row", "3"])


def test_the_end_leaves_time_for_running_answers() -> None:
    drain = options(COMMANDS["dynexport.service"])["drain_seconds"]
    service = unit()["Service"]
    assert int(service["TimeoutStopSec"]) >= drain + LAST
    assert service["KillSignal"] == "SIGTERM"
    drain = options(COMMANDS["kubernetes.yaml"])["drain_seconds"]
    sleep, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + drain + LAST
    liveness = container()["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > pod["terminationGracePeriodSeconds"]


def test_probes_ask_for_paths_of_the_app() -> None:
    paths = set(create_app(Directory({}), HttpSettings()).openapi()["paths"])
    probes = [container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["path"] for probe in probes} == {"/health", "/ready"} <= paths
    assert {probe["port"] for probe in probes} == {"http"}
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": options(COMMANDS["kubernetes.yaml"])["port"]}
    assert [each["targetPort"] for each in manifest("Service")["spec"]["ports"]] == ["http"]
    assert f"EXPOSE {options(COMMANDS['Dockerfile'])['port']}\n" in DOCKERFILE


def test_files_that_a_pod_reads_are_mounted_for_its_user() -> None:
    found = options(COMMANDS["kubernetes.yaml"])
    mounts = {Path(mount["mountPath"]): mount for mount in container()["volumeMounts"]}
    for path in (found["bundles"][0], found["api_key_file"]):
        assert mounts[path.parent]["readOnly"]
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in mounts.values()}
    user = pod["securityContext"]["runAsUser"]
    assert f"\nUSER {user}:{user}\n" in DOCKERFILE and user > 0


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_of_the_image_asks_whether_the_server_is_ready(status: int, code: int) -> None:
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    python, flag, program = instruction("HEALTHCHECK")
    assert (python, flag) == ("python", "-c")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        here = program.replace(":8000/", f":{server.server_port}/")
        ran = subprocess.run([sys.executable, flag, here], capture_output=True, timeout=30)
    assert (ran.returncode, asked) == (code, ["/ready"])


def test_the_image_gets_the_files_that_make_the_package(tmp_path: Path) -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    names = {name for line in copied for name in line}
    assert names == sent
    for name in names - {"constraints.txt"}:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    words = ["setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, *words], check=True, cwd=tmp_path, env=environment(), capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        found = set(file.namelist())
    assert found >= {f"{package.replace('.', '/')}/py.typed" for package in FOLDERS.values()}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_the_unit_is_understood_by_systemd(tmp_path: Path) -> None:
    text = (DEPLOY / "dynexport.service").read_text()
    path = tmp_path / "dynexport.service"
    path.write_text(text.replace("/opt/dynexport/bin/dynexport", shutil.which("true") or ""))
    ran = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=20", path]  # 2.0 of 10
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    path.write_text(path.read_text().replace("ProtectHome=yes", "ProtectHom=yes"))
    assert "ProtectHom" in subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True).stderr
