"""The transport: one thin servicer a file, and what they share. Alone in knowing gRPC."""
