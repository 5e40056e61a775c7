"""The Hugging Face Hub as a file system: pinned revisions, byte ranges, a bounded spool."""
