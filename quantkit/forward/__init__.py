"""The forward pass, layer by layer over GGUF tensors: from a checkpoint or from a GGUF alike."""
