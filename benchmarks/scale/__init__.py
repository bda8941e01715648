"""Ten thousand streams: what they hold, and what they live through. `make bench-scale`."""
