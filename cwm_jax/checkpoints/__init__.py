"""Saving and loading models: runs, exports, bundles, PyTorch files."""
