"""Scores of predictions, their intervals, ensembles and temperatures. Pure numpy; nothing of ours but errors."""
