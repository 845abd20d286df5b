"""Scores of cached predictions joined with their labels: result.json and report.html. No model, no torch."""
