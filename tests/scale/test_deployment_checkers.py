"""The deployment files, judged by the checkers of others: hadolint, and Kubernetes' own schemas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from house import ROOT

DEPLOY = ROOT / "samples" / "deploy"


@pytest.mark.parametrize("file", ["kubernetes.yaml", "kubernetes-autoscaling.yaml"])
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifests_fulfil_the_schemas_of_kubernetes(file: str, version: str) -> None:
    for resource in yaml.safe_load_all((DEPLOY / file).read_text()):
        assert kubernetes_validate.validate(resource, version, strict=True).startswith(version)
        wrong = {**resource, "spec": {**resource["spec"], "replica": 2}}
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)


def test_hadolint_has_no_objection(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    ran = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((DEPLOY / "Dockerfile").read_text().replace("USER 10001:10001", "USER root"))
    assert "DL3002" in subprocess.run([hadolint, wrong], capture_output=True, text=True).stdout
