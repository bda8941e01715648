"""Pure rules of the federation: no gRPC, no SQL, no clock of their own."""
