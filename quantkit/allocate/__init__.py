"""Which type every tensor gets, so that a file of a given size loses least."""
