"""How to run a file: what it needs, what it will be like, and the command lines for it."""
