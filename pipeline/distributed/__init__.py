"""Processes: how they are started, how they watch each other, and what they do together."""
