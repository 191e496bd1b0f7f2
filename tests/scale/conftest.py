"""Tests of what runs dynexport's server on other systems. `make test-scale` runs all of them."""

from __future__ import annotations

from importlib.util import find_spec

# Ray and the checkers of deployment files are in a virtual environment of their own (Makefile, test-scale).
collect_ignore = [] if find_spec("ray") else ["test_ray_serve.py"]
