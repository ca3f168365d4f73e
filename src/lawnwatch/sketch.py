"""What a set of pictures looks like, in a few kilobytes: made once of the training photographs, later of live ones.

A sketch counts; it keeps no picture. Sketches of two sets merge into the sketch of both, in any order, so every
process and every hour can make its own. Two sketches can be compared because bins and directions are constants.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lawnwatch.errors import IntegrityError

DIRECTIONS = 32
# Bin edges, shared by all sketches for ever; values beyond the ends are counted in the outer bins.
PROJECTION_EDGES = np.linspace(-0.15, 0.15, 61)  # of a unit vector on a random unit direction
BRIGHTNESS_EDGES = np.linspace(0.0, 1.0, 41)  # mean luma
SHARPNESS_EDGES = np.linspace(0.0, 12.0, 49)  # log(1 + variance of the Laplacian)


@dataclass(frozen=True)
class Sketch:
    """Counts and moments of a set of pictures.

    Attributes:
        count: pictures in it.
        mean: (d,) float64, mean of the embeddings scaled to unit length.
        square: (d,) float64, sum of squared deviations from the mean.
        projections: (DIRECTIONS, bins) int64, histograms of the embeddings along fixed random directions.
        brightness: (bins,) int64.
        sharpness: (bins,) int64.
    """

    count: int
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    projections: NDArray[np.int64]
    brightness: NDArray[np.int64]
    sharpness: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        embeddings: NDArray[np.floating[Any]],
        brightness: NDArray[np.floating[Any]],
        sharpness: NDArray[np.floating[Any]],
    ) -> Sketch:
        """The sketch of n pictures.

        Args:
            embeddings: (n, d), of any length each.
            brightness: (n,), 0 to 1, from `images.brightness`.
            sharpness: (n,), from `images.sharpness`.
        """
        unit = embeddings.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        mean = unit.mean(axis=0) if len(unit) else np.zeros(unit.shape[1])
        along = unit @ directions(unit.shape[1])
        return cls(
            count=len(unit),
            mean=mean,
            square=((unit - mean) ** 2).sum(axis=0),
            projections=np.stack([_histogram(along[:, i], PROJECTION_EDGES) for i in range(DIRECTIONS)]),
            brightness=_histogram(brightness, BRIGHTNESS_EDGES),
            sharpness=_histogram(np.log1p(sharpness), SHARPNESS_EDGES),
        )

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both sets together (Chan's update of mean and squared deviations)."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"embeddings must be of one length; received {self.mean.shape}, {other.mean.shape}")
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count if count else 0.0
        return Sketch(
            count=count,
            mean=self.mean + delta * share,
            square=self.square + other.square + delta**2 * self.count * share,
            projections=self.projections + other.projections,
            brightness=self.brightness + other.brightness,
            sharpness=self.sharpness + other.sharpness,
        )

    def to_bytes(self) -> bytes:
        """As an npz without pickles."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            allow_pickle=False,
            count=np.int64(self.count),
            mean=self.mean,
            square=self.square,
            projections=self.projections,
            brightness=self.brightness,
            sharpness=self.sharpness,
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Sketch:
        """Read what `to_bytes` wrote. Raises IntegrityError when it is something else."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                found = cls(
                    count=int(arrays["count"]),
                    mean=arrays["mean"],
                    square=arrays["square"],
                    projections=arrays["projections"],
                    brightness=arrays["brightness"],
                    sharpness=arrays["sharpness"],
                )
        except (ValueError, KeyError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"this is no sketch: {error}") from error
        shapes = (found.projections.shape, found.brightness.shape, found.sharpness.shape)
        expected = (
            (DIRECTIONS, len(PROJECTION_EDGES) - 1),
            (len(BRIGHTNESS_EDGES) - 1,),
            (len(SHARPNESS_EDGES) - 1,),
        )
        if shapes != expected or found.mean.ndim != 1 or found.mean.shape != found.square.shape:
            raise IntegrityError(f"a sketch has histograms of {expected}; received {shapes}.")
        return found


@cache
def directions(length: int) -> NDArray[np.float64]:
    """(length, DIRECTIONS) random unit vectors, the same in every process."""
    drawn = np.random.default_rng(20260101).standard_normal((length, DIRECTIONS))
    return np.asarray(drawn / np.linalg.norm(drawn, axis=0))


def _histogram(values: NDArray[np.floating[Any]], edges: NDArray[np.float64]) -> NDArray[np.int64]:
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    return counts.astype(np.int64)
