"""The ensemble that a run ended with, applied to new rows."""
