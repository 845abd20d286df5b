"""What the command does, a file per stage; `table` lists them."""
