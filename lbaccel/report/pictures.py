"""Pictures inside the page, within a bound on their bytes (no torch)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 600_000  # of all pictures of a page
_MOST_PIXELS = 40_000_000
_WIDTHS = (1600, 1200, 900, 640)
_QUALITIES = (82, 65)


@dataclass
class PictureRoom:
    """The bytes that pictures may still take."""

    left: int = MOST_BYTES

    def embedded(self, path: Path) -> tuple[str | None, str]:
        """The picture as a `data:` address, smaller where it must be, and a sentence or nothing.

        A PNG that fits goes in as it is; another one as WebP. None is a picture that fits in no
        form, or can't be read; the sentence says so.
        """
        try:
            kind, content = self._within(path)
        except (OSError, ValueError, SyntaxError) as error:  # of PIL, for a damaged file
            reason = getattr(error, "strerror", None) or type(error).__name__
            return None, f"{path.name} can't be read ({reason}), so it is left out."
        if content is None:
            return None, f"{path.name} is too large for this page, so it is left out."
        text = base64.b64encode(content).decode()
        self.left -= len(text)
        return f"data:image/{kind};base64,{text}", ""

    def _within(self, path: Path) -> tuple[str, bytes | None]:
        from PIL import Image

        room = self.left * 3 // 4  # base64 takes four bytes for three
        with Image.open(path) as image:
            if image.format not in ("PNG", "JPEG", "WEBP") or (
                image.width * image.height > _MOST_PIXELS
            ):
                return "", None
            size = path.stat().st_size
            if image.format == "PNG" and size <= min(room, MOST_BYTES // 4):
                image.verify()
                return "png", path.read_bytes()
            whole = image.convert("RGB")
        for width in _WIDTHS:
            for quality in _QUALITIES:
                small = whole.copy()
                small.thumbnail((width, 4 * width))
                content = io.BytesIO()
                small.save(content, "WEBP", quality=quality)
                if content.tell() <= min(room, MOST_BYTES // 2):
                    return "webp", content.getvalue()
        return "", None
