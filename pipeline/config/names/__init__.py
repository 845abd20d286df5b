"""The names of keys: which there are, what they mean, and what a wrong one was meant to be."""
