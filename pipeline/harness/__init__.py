"""Tasks of lm-evaluation-harness, answered by the members of a run."""
