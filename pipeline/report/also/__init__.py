"""More data sets that a run is scored on (`evaluate.also`)."""
