"""The wire: one thin servicer a file, what stands before them, and the converters."""
