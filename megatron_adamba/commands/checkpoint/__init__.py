"""`adamba checkpoint`: a file for each operation."""
