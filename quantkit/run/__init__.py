"""How work survives: files, journal, threads, events. Knows nothing of quantisation."""
