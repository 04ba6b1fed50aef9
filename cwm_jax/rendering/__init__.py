"""Frames, keys and numbers as pictures: contact sheets, videos, key panels, plots."""
