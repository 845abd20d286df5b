"""What the product costs, as ratios measured in pairs: `python -m benchmarks` (docs/benchmarks.md)."""
