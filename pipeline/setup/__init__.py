"""How .venv is made. Standard library only."""
