"""Serve many requests at a time: a scheduler of rows, reuse of prompts' prefixes, an HTTP server."""
