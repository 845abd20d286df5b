"""Scores of predictions, their intervals, ensembles, temperatures, choices: numpy, and nothing of ours but errors."""
