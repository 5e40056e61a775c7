"""What the tensors of each model family mean in GGUF terms."""
