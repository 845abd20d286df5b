"""Whether this machine, its packages and a configuration are fit to run."""
