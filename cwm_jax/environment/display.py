"""A window that shows frames, by pygame."""

import numpy as np

from cwm_jax.errors import UserError


class Display:
    """A window; its close button closes only the window."""

    def __init__(self, title: str, fps: int):
        try:
            import pygame
        except ImportError:
            raise UserError(
                "render_mode='human' needs pygame: pip install 'cwm_jax[env]'"
            ) from None
        self._pygame, self._title, self._fps = pygame, title, fps
        self._screen, self._clock = None, pygame.time.Clock()
        self._is_closed = False

    def show(self, frame_HWC: np.ndarray) -> None:
        """Shows a frame, uint8, and waits to keep the frame rate."""
        if self._is_closed:
            return
        pygame = self._pygame
        if self._screen is None:
            pygame.display.init()
            try:
                self._screen = pygame.display.set_mode(frame_HWC.shape[1::-1])
            except pygame.error as error:
                raise UserError(
                    f"cannot open a window ({error}); use render_mode='rgb_array'"
                ) from None
            pygame.display.set_caption(self._title)
        self._screen.blit(pygame.surfarray.make_surface(frame_HWC.swapaxes(0, 1)), (0, 0))
        self._is_closed = any(event.type == pygame.QUIT for event in pygame.event.get())
        pygame.display.flip()
        self._clock.tick(self._fps)
        if self._is_closed:
            pygame.display.quit()

    def close(self) -> None:
        if self._screen is not None and not self._is_closed:
            self._pygame.display.quit()
        self._is_closed = True
