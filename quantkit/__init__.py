"""quantkit: safetensors checkpoints, however large, into dynamic low-bit GGUF shards."""

__version__ = "0.1.0"
