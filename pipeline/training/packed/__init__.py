"""Many runs in one process: their parameters stacked, one pass, one optimizer, one prediction pass."""
