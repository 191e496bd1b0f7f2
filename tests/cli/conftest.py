"""Bundles that the tests of the command line share."""

from bundles import dense_bundle, ids_bundle, skip_bundle  # noqa: F401 - fixtures
