"""Search over dropout rate, rank and learning rate with Ray Tune."""
