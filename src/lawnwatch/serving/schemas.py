"""What the API answers, for its OpenAPI document; the examples are real answers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ModelName(_Answer):
    """Which model answered."""

    name: str = Field(examples=["lawnwatch"])
    version: int = Field(examples=[3])
    sha256: str = Field(examples=["5f2b" * 16], description="The bundle's name: SHA-256 of its manifest.")


class ImageFacts(_Answer):
    """What was sent."""

    format: str = Field(examples=["JPEG"])
    width: int = Field(examples=[275])
    height: int = Field(examples=[183])
    bytes: int = Field(examples=[11034])


class Timings(_Answer):
    """Milliseconds."""

    decode: float = Field(examples=[0.9])
    infer: float = Field(examples=[5.4])
    total: float = Field(examples=[7.1], description="From the request's head to the answer, waiting included.")


class PredictionAnswer(_Answer):
    """The answer to a picture."""

    prediction_id: str = Field(examples=["0198f2a4-7c1e-7b3a-9c55-3f0d1f2e4a6b"])
    label: str = Field(examples=["dandelion"], description="The likeliest class, or `unknown`.")
    confidence: float = Field(examples=[0.983], description="Calibrated probability of the likeliest class.")
    probabilities: dict[str, float] = Field(examples=[{"dandelion": 0.983, "grass": 0.017}])
    unknown_score: float | None = Field(
        examples=[0.12], description="How little the picture looks like any class; null when not measured."
    )
    model: ModelName
    image: ImageFacts
    timings_ms: Timings


class Health(_Answer):
    """The process is alive."""

    status: str = Field(examples=["ok"])


class Ready(_Answer):
    """A verified model is loaded and the process takes requests."""

    status: str = Field(examples=["ready"])
    model: ModelName


class Golden(_Answer):
    """How the golden answers came out on this machine."""

    ok: bool
    max_error: float | None


class TargetInfo(_Answer):
    """What should serve."""

    version: int
    sha256: str


class Rejected(_Answer):
    """The bundle that was refused last, and why; the one before it goes on serving."""

    sha256: str
    reason: str


class ModelInfo(_Answer):
    """What serves, where it came from and how good it is."""

    state: str = Field(examples=["ready"], description="`ready` or `no_model`.")
    reason: str = Field(description="Why there is no model, or what stands in the way of the target.")
    model: ModelName | None
    classes: list[str]
    samples: bool = Field(description="True: trained on drawn sample pictures, not on photographs.")
    evaluation: dict[str, Any]
    lineage: dict[str, Any]
    thresholds: dict[str, Any]
    model_card: str
    loaded_at: datetime | None
    load_seconds: float | None
    golden: Golden | None
    target: TargetInfo | None
    rejected: Rejected | None


class PredictionItem(_Answer):
    """One recorded prediction."""

    prediction_id: str
    created_at: datetime
    label: str
    confidence: float
    probabilities: dict[str, float]
    unknown_score: float | None
    model_version: int
    model_sha256: str
    brightness: float | None
    sharpness: float | None
    image: ImageFacts
    image_url: str | None = Field(description="Where the picture is; null when it was not kept.")


class PredictionList(_Answer):
    """Recorded predictions, newest first."""

    items: list[PredictionItem]
    next: str | None = Field(description="`before` of the next page; null at the end.")
