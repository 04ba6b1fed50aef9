"""One player's session: its frames and actions, where it starts, its share code."""
