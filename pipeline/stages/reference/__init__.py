"""What the command tells about itself."""
