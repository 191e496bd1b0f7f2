"""Find the packages: three top-level folders are subpackages of dynexport, which pyproject.toml has no search for."""

from setuptools import find_packages, setup

FOLDERS = ("exporter", "plugins", "runtime")
FOUND = find_packages(include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")])

setup(packages=["dynexport", *(f"dynexport.{name}" for name in FOUND)])
