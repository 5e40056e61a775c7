"""The GGUF format itself: values, layout, and a reader that trusts nothing."""
