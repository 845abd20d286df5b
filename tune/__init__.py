"""Search over configurations with Ray Tune. The only package that imports ray.

It uses nothing of `pipeline` but the names that `pipeline/__init__` exports, so that the process
that drives a search loads neither torch nor deepspeed; only the trials' own processes do.
"""
