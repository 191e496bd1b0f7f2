"""Run a bundle's graphs on a batch of rows over KV caches."""
