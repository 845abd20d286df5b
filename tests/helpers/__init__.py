"""What tests share: tiny models with adapters, references written out in float64, stand-ins for processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
