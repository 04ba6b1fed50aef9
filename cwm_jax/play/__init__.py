"""Interactive play: sessions, the device that they share, and the page in the browser."""
