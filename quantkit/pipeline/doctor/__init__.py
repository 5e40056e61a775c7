"""What `quantkit doctor` finds out about this machine, and about a job on it."""
