"""Blocks into GGUF shards that are right or absent."""
