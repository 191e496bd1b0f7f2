"""Write bundles: convert a checkpoint, describe it in the manifest, store its weights."""
