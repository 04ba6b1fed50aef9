"""One player's session: its frames and actions, its prompt, its share code."""
