"""What a quantized model lost: scores, summaries and reports."""
