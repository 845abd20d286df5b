"""What models say about rows under members."""
