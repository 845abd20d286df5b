"""Folders as serving engines take them: one rank, one scaling, plain matrices, and the command that serves them."""
