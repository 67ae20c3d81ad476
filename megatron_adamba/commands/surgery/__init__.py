"""`adamba surgery`: a file for each operation."""
