"""From the columns that people have to the rows that the reader wants."""
