"""Which part of a picture speaks for a class: the class activation map, drawn over it."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

STRENGTH = 0.6  # largest opacity of the map over its picture


def overlay(picture: NDArray[np.uint8], cam: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """A picture with a class activation map over it (Zhou et al. 2016).

    Args:
        picture: (height, width, 3) uint8.
        cam: (h, w), larger speaks for the class.
    """
    heat = cv2.resize(cam.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    heat = np.clip((heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-6), 0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    weight = STRENGTH * heat[..., np.newaxis]
    return np.asarray(picture * (1 - weight) + colours * weight, dtype=np.uint8)
