"""Neurons to copy from. Nothing of the federation or the SDK imports them."""
