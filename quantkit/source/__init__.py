"""Where weights come from: safetensors checkpoints and their packed formats."""
