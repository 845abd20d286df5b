"""What is deployed: a file per target, and the proof that stock tools compute the same."""
