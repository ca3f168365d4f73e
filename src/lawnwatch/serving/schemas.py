"""What the API answers, for its OpenAPI document; the examples are real answers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lawnwatch.serving.problems import Problem


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
    explain: float | None = Field(None, examples=[6.2], description="Drawing the heat map; with `explain=true` alone.")
    total: float = Field(examples=[7.1], description="From the request's head to the answer, waiting included.")


class Explanation(_Answer):
    """What in the picture speaks for a class: its class activation map."""

    of: str = Field(alias="class", examples=["dandelion"], description="The likeliest class, whatever the label.")
    png_base64: str = Field(
        examples=["iVBORw0KGgo…"],
        description="The picture, upright and at most 320 pixels wide and high, with the map over it: a PNG in base64.",
    )


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
    explanation: Explanation | None = Field(
        None, description="With `?explain=true`; null when the model does not tell. Otherwise not there."
    )


class PictureUrl(BaseModel):
    """Where a picture is."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(
        min_length=1, max_length=2048, examples=["https://example.org/lawn.jpg"], description="http or https."
    )


class BatchPrediction(_Answer):
    """The answer to one picture of a batch."""

    prediction_id: str
    label: str
    confidence: float
    probabilities: dict[str, float]
    unknown_score: float | None
    image: ImageFacts
    timings_ms: Timings
    explanation: Explanation | None = Field(None, description="As POST /predict has it.")


class BatchItem(_Answer):
    """One picture of a batch: its answer or its problem, the other is null."""

    index: int = Field(examples=[0], description="The picture's place in the form, from 0.")
    prediction: BatchPrediction | None
    problem: Problem | None


class BatchTimings(_Answer):
    """Milliseconds."""

    total: float = Field(examples=[31.4])


class BatchAnswer(_Answer):
    """The answers to a batch, in the order of its pictures."""

    items: list[BatchItem]
    answered: int = Field(examples=[2])
    failed: int = Field(examples=[0])
    model: ModelName
    timings_ms: BatchTimings


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
    client: str | None = Field(description="Id of the API key that asked; null when none was needed.")
    brightness: float | None
    sharpness: float | None
    image: ImageFacts
    image_url: str | None = Field(description="Where the picture is; null when it was not kept.")


class PredictionList(_Answer):
    """Recorded predictions, newest first."""

    items: list[PredictionItem]
    next: str | None = Field(description="`before` of the next page; null at the end.")


class V2Server(_Answer):
    """The server, as the Open Inference Protocol describes it."""

    name: str = Field(examples=["lawnwatch"])
    version: str
    extensions: list[str]


class V2Live(_Answer):
    """The process is alive."""

    live: bool


class V2Ready(_Answer):
    """A verified model is loaded."""

    ready: bool


class V2ModelReady(_Answer):
    """The model is loaded."""

    name: str
    ready: bool


class V2Tensor(_Answer):
    """What a tensor is."""

    name: str = Field(examples=["file"])
    datatype: str = Field(examples=["BYTES"])
    shape: list[int] = Field(examples=[[-1]], description="-1 where the number of pictures stands.")


class V2Model(_Answer):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[V2Tensor]
    outputs: list[V2Tensor]
    parameters: dict[str, Any]


class V2Input(_Answer):
    """A tensor that is sent; its data is raw behind the JSON when `parameters.binary_data_size` says so."""

    name: str = Field(examples=["file"])
    datatype: str = Field(examples=["BYTES"])
    shape: list[int] = Field(examples=[[1]])
    data: list[Any] = Field([], examples=[["/9j/4AAQSkZJRg…"]])
    parameters: dict[str, Any] = {}


class V2Wanted(_Answer):
    """An output that is wanted."""

    name: str = Field(examples=["label"])
    parameters: dict[str, Any] = {}


class V2Request(_Answer):
    """An inference request."""

    id: str = ""
    inputs: list[V2Input] = Field(min_length=1, max_length=1)
    outputs: list[V2Wanted] = Field([], description="Empty: label, confidence, probabilities and unknown_score.")
    parameters: dict[str, Any] = {}


class V2Output(_Answer):
    """A tensor of the answer."""

    name: str = Field(examples=["label"])
    datatype: str = Field(examples=["BYTES"])
    shape: list[int] = Field(examples=[[1]])
    data: list[Any] | None = Field(None, examples=[["dandelion"]])
    parameters: dict[str, Any] | None = None


class V2Answer(_Answer):
    """The answer to an inference request."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[V2Output]
