"""Tests of what runs dynexport's server on other systems. `make test-scale` runs all of them."""

from __future__ import annotations

from importlib.util import find_spec

# These packages are in a virtual environment of their own (Makefile, test-scale).
_NEEDS = {"test_ray_serve.py": "ray", "test_deployment_checkers.py": "kubernetes_validate"}
collect_ignore = [file for file, package in _NEEDS.items() if find_spec(package) is None]
