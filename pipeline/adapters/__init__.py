"""LoRA adapters under structured dropout, all carried by the member axis."""
