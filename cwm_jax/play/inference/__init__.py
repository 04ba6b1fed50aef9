"""Inference for play: compiled programs and the queue that calls them."""
