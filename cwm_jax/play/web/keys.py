"""The keys that one player holds and taps."""


class Keys:
    """The held keys, and keys tapped since the last frame; read by the device's thread.

    Args:
        idle: the action while nothing is held.
    """

    def __init__(self, idle: int):
        self._idle = idle
        self.held, self.tapped = idle, None
        self._stamp = self.frame_stamp = 0.0

    @property
    def down(self) -> bool:
        """Whether a key is held, or was tapped since the last frame."""
        return self.held != self._idle or self.tapped is not None

    def press(self, action: int, stamp: float) -> None:
        self.held, self._stamp = action, stamp
        if action != self._idle:
            self.tapped = action

    def release(self) -> None:
        self.held, self.tapped = self._idle, None

    def tap_idle(self) -> None:
        """Requests one frame without a key."""
        self.tapped = self._idle

    def take(self, ordered: int) -> int:
        """The action for the frame that now begins.

        Args:
            ordered: the action held when the frame was ordered, for a key released since.
        """
        tapped = self.take_tap()
        if self.held != self._idle:
            return self.held
        return ordered if tapped is None else tapped

    def take_tap(self) -> int | None:
        """The last key pressed since the last frame, or None; used for one frame only."""
        tapped, self.tapped = self.tapped, None
        self.frame_stamp, self._stamp = self._stamp or self.frame_stamp, 0.0
        return tapped
