"""A bundle on disk: its contract, its manifest, its files. Everything else in the runtime stands on this."""
