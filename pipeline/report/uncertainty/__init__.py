"""What systems know of their own errors, and how they agree with people."""
