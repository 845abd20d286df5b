"""What works, found by trying: tables of model families and sites, of DeepSpeed files and bases."""
