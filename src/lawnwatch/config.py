"""Settings: the only place that reads the environment.

Every setting is `LAWNWATCH_<NAME>`; a group's member is `LAWNWATCH_<GROUP>__<NAME>`. With nothing set, everything lives
below one folder (`./var`): SQLite catalog, local-directory store, MLflow on SQLite. That is the embedded mode.
`docs/settings.md` is generated from this file.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as UnreadableSettings

from lawnwatch.errors import SettingsError

# Passwords that everybody knows are as good as none.
PLACEHOLDERS = frozenset(
    {"", "admin", "changeme", "changethis", "change-me", "default", "minioadmin", "password", "root", "secret", "test"}
)


class FetchSettings(BaseModel):
    """How pictures are fetched from the web."""

    concurrency: int = Field(32, ge=1, description="Requests under way at once, over all hosts.")
    per_host: int = Field(8, ge=1, description="Requests under way at once to one host.")
    connect_timeout: float = Field(5.0, gt=0, description="Seconds until a connection must stand.")
    read_timeout: float = Field(10.0, gt=0, description="Seconds of silence after which a response is given up.")
    total_timeout: float = Field(60.0, gt=0, description="Seconds for one image, retries and redirects included.")
    attempts: int = Field(3, ge=1, description="Tries for one image before its failure is recorded.")
    max_bytes: int = Field(20_000_000, ge=1, description="Largest image file, bytes, counted after decompression.")
    max_redirects: int = Field(3, ge=0, description="Redirects followed; each hop is checked anew.")
    host_failures: int = Field(
        5, ge=1, description="Failures in a row after which a host is left alone for `host_pause` seconds."
    )
    host_pause: float = Field(
        60.0, gt=0, description="Seconds a failing host is left alone; its images wait their turn."
    )
    allow_hosts: list[str] = Field([], description="When set, only these hosts are fetched from (JSON list).")
    allow_cidrs: list[str] = Field(
        [], description="Development only: networks that may be dialled though not public, such as 127.0.0.0/8."
    )
    origin_map: dict[str, str] = Field(
        {},
        description="Development only: URL prefix to the URL prefix that is really fetched; the catalog keeps the "
        "real URLs (JSON object).",
    )


class ImageSettings(BaseModel):
    """What a picture may be."""

    max_pixels: int = Field(
        50_000_000, ge=1, description="Most pixels of a picture, of a WebP half as many; decided before decoding."
    )


class DataSettings(BaseModel):
    """What a snapshot must hold, and how it is split."""

    min_per_class: int = Field(20, ge=1, description="Fewest usable images of a class before training is refused.")
    max_bad_ratio: float = Field(0.25, ge=0, le=1, description="Largest share of failed images a run may end with.")
    validation_share: float = Field(0.15, gt=0, lt=1, description="Share of the first snapshot held for validation.")
    test_share: float = Field(0.20, gt=0, lt=1, description="Share of the first snapshot frozen as the test split.")
    near_duplicate_distance: int = Field(
        6, ge=0, le=16, description="Largest Hamming distance of two 64-bit perceptual hashes of the same picture."
    )
    batch_images: int = Field(2000, ge=1, description="Images that one mapped task of `data_pipeline` fetches.")
    max_batches: int = Field(8, ge=1, description="Most mapped fetch tasks of one `data_pipeline` run.")
    cache_bytes: int = Field(
        5_000_000_000, ge=0, description="Largest size of the local cache of objects, bytes; the least used go first."
    )


class QualitySettings(BaseModel):
    """The checks that data must pass before it becomes a snapshot."""

    max_imbalance: float = Field(10.0, ge=1, description="Most images of the largest class per image of the smallest.")
    max_label_conflicts: float = Field(
        0.05, ge=0, le=1, description="Largest share of images quarantined because copies carry different labels."
    )
    max_copies: float = Field(
        0.5, ge=0, le=1, description="Largest share of images that only repeat or resemble another one."
    )
    max_one_host: float = Field(1.0, ge=0, le=1, description="Largest share of images that come from one host; 1: any.")
    max_label_suspects: float = Field(
        0.2, ge=0, le=1, description="Largest share of images whose label the champion confidently disputes."
    )
    min_side: int = Field(32, ge=1, description="Shortest side below which an image counts as too small, pixels.")
    max_too_small: float = Field(0.1, ge=0, le=1, description="Largest share of too small images.")
    min_brightness: float = Field(0.02, ge=0, le=1, description="Mean luma below which an image counts as blank.")
    max_brightness: float = Field(0.98, ge=0, le=1, description="Mean luma above which an image counts as blank.")
    min_sharpness: float = Field(
        10.0, ge=0, description="Variance of the Laplacian at 224 × 224 below which an image counts as blank."
    )
    max_blank: float = Field(0.02, ge=0, le=1, description="Largest share of blank images.")
    label_images: int = Field(
        2000, ge=0, description="Most images whose label the champion is asked about; those it never saw come first."
    )
    contact_sheet: int = Field(48, ge=1, description="Most pictures on one contact sheet of the quality report.")


class TrainSettings(BaseModel):
    """How a model is trained."""

    seed: int = Field(17, description="Seed of every random choice in training.")
    budget_seconds: float = Field(120.0, gt=0, description="Time for training all candidates of a run, seconds.")
    candidates: list[str] = Field([], description="Names of the candidates to train (JSON list); empty: all.")
    fine_tune_epochs: int = Field(8, ge=0, description="Most epochs of fine-tuning; 0 leaves that candidate out.")
    batch_size: int = Field(32, ge=1, description="Images in a training batch.")
    sweep_seconds: float = Field(
        0.0, ge=0, description="Time to search for strength, views, learning rate and epochs, seconds; 0: no search."
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="What trains; auto: a GPU when there is one.")


class GateSettings(BaseModel):
    """What a model must show before it is promoted."""

    min_test_images: int = Field(30, ge=1, description="Fewest test images on which anything is decided.")
    min_accuracy: float = Field(0.75, ge=0, le=1, description="Floor: lower 95 % bound of test accuracy.")
    min_class_recall: float = Field(0.5, ge=0, le=1, description="Floor: recall of each class.")
    min_robust_accuracy: float = Field(
        0.6, ge=0, le=1, description="Floor: accuracy on altered test images (JPEG, blur, dark, tilt, crop), each kind."
    )
    max_ece: float = Field(0.15, gt=0, le=1, description="Limit: expected calibration error.")
    max_unknown: float = Field(0.15, ge=0, le=1, description="Limit: share of the test images called unknown.")
    max_latency_ms: float = Field(250.0, gt=0, description="Limit: median time of one inference, milliseconds.")
    max_model_bytes: int = Field(50_000_000, ge=1, description="Limit: size of the model file, bytes.")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="Rate at which a challenger may pass for better, or for not worse, by luck."
    )
    margin: float = Field(0.05, gt=0, lt=1, description="Non-inferiority margin against the champion, in accuracy.")
    class_margin: float = Field(0.15, gt=0, lt=1, description="Non-inferiority margin of each class, in recall.")
    log_loss_margin: float = Field(
        0.1, gt=0, description="How much the log loss may be above the champion's: its calibration, paired."
    )
    robust_margin: float = Field(
        0.1, gt=0, lt=1, description="How much the accuracy on altered test images may be below the champion's."
    )
    max_latency_ratio: float = Field(1.5, gt=0, description="Limit: inference time in multiples of the champion's.")
    variant_loss: float = Field(
        0.005, ge=0, lt=1, description="Largest loss of accuracy of a served graph of reduced arithmetic, such as int8."
    )
    variant_speedup: float = Field(1.1, ge=1, description="How many times as fast as float32 such a graph must be.")
    cheaper: float = Field(
        0.8, gt=0, lt=1, description="A model of at most this share of the champion's time or size counts as cheaper."
    )


class ServingSettings(BaseModel):
    """The API."""

    host: str = Field("127.0.0.1", description="Address the API listens on.")
    port: int = Field(8000, description="Port the API listens on.")
    threads: int = Field(2, ge=1, description="Inferences under way at once; each holds one thread.")
    queue: int = Field(256, ge=0, description="Requests that may wait for a thread; more are refused with 503.")
    max_wait: float = Field(
        4.0,
        gt=0,
        description="Seconds that a request may wait for a thread; `queue` shrinks to that at the measured speed.",
    )
    max_upload_bytes: int = Field(
        20_000_000, ge=1, description="Largest picture, and largest JSON part of a `/v2` request, bytes."
    )
    request_timeout: float = Field(30.0, gt=0, description="Seconds for a request, its body's arrival included.")
    poll_seconds: float = Field(1.0, gt=0, description="How often the release target is looked at.")
    drain_seconds: float = Field(0.0, ge=0, description="After SIGTERM: seconds of being not ready but answering.")
    record_images: Literal["none", "sampled", "uncertain", "all"] = Field(
        "all", description="Which uploaded pictures are kept with their prediction."
    )
    record_sample: float = Field(0.05, ge=0, le=1, description="Share of the pictures that `sampled` keeps.")
    record_queue: int = Field(1000, ge=1, description="Predictions that may wait to be recorded; more are dropped.")
    model_version: Annotated[int | None, BeforeValidator(lambda given: None if given == "" else given)] = Field(
        None, ge=1, description="On Kubernetes: version of the model to serve; the pod template says it."
    )
    model_sha256: str = Field("", description="On Kubernetes: bundle to serve, 64 hexadecimal digits; as above.")
    retention_days: int = Field(
        90,
        ge=0,
        le=36_500,
        description="Days that predictions and their pictures are kept; 0: for ever. `predictions prune` deletes.",
    )
    max_batch_pictures: int = Field(32, ge=1, description="Most pictures of one batch.")
    max_batch_bytes: int = Field(50_000_000, ge=1, description="Largest body of a batch or of a `/v2` request, bytes.")
    url_hosts: list[str] = Field(
        [],
        description="Hosts, with subdomains, that `POST /predict/url` fetches from (JSON list); empty: it is off.",
    )
    url_timeout: float = Field(10.0, gt=0, description="Seconds for fetching a picture by URL.")
    url_concurrency: int = Field(8, ge=1, description="Pictures fetched by URL at once; more are refused with 503.")
    require_keys: bool = Field(
        False, description="Ask for API keys (`lawnwatch key create`); unset, everybody may do everything."
    )
    cors_origins: list[str] = Field(
        [], description="Web origins whose pages may call the API, such as https://example.org (JSON list)."
    )
    trusted_proxies: list[IPvAnyNetwork] = Field(
        [], description="Networks of proxies whose X-Forwarded-For names the client (JSON list), such as 10.0.0.0/8."
    )


class RolloutSettings(BaseModel):
    """Where a model is put into service."""

    target: Literal["local", "kubernetes"] = Field(
        "local",
        description="`local`: a pointer in the store that the API follows; `kubernetes`: the pod template of the API's "
        "Deployment.",
    )
    deployment: str = Field("lawnwatch-api", description="Name of the API's Deployment.")
    namespace: str = Field("", description="Its namespace; empty: the one this pod runs in.")
    service_account: str = Field("", description="Service account of the rollout's pods; empty: that of all steps.")


class ExporterSettings(BaseModel):
    """The exporter of pipeline facts."""

    host: str = Field("127.0.0.1", description="Address the exporter listens on.")
    port: int = Field(9105, description="Port the exporter listens on.")
    airflow_url: str = Field("", description="Airflow's API server, such as `http://airflow:8080`; empty: not asked.")
    airflow_password: SecretStr = Field(SecretStr(""), description="Password of Airflow's user `admin`.")


class Toleration(BaseModel):
    """A taint that a pod bears, in Kubernetes' words."""

    key: str | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = Field(None, alias="tolerationSeconds")


class StepResources(BaseModel):
    """What the pod of a step asks for."""

    cpu: str = Field(description="CPU request, such as `500m`; there is no limit.")
    memory: str = Field(description="Memory request and limit, such as `2Gi`.")
    node_selector: dict[str, str] = Field({}, alias="nodeSelector", description="Labels of its nodes.")
    tolerations: list[Toleration] = Field([], description="Taints of its nodes that it bears.")


class Settings(BaseSettings):
    """All settings of lawnwatch."""

    model_config = SettingsConfigDict(
        env_prefix="LAWNWATCH_", env_nested_delimiter="__", extra="ignore", populate_by_name=True
    )

    environment: Literal["development", "production"] = Field(
        "development", description="`production` refuses the settings that are for development only."
    )
    home: Path = Field(Path("var"), description="Folder of everything that the embedded mode keeps.")
    database_url: SecretStr = Field(
        SecretStr(""), description="Catalog: `mysql+pymysql://user:password@host/database`; empty: SQLite in home."
    )
    import_database_url: SecretStr = Field(
        SecretStr(""),
        description="Database that `catalog import-table` reads: `mysql+pymysql://user:password@host/database`; "
        "empty: the catalog's own.",
    )
    store_url: str = Field("", description="Object store: `s3://bucket[/prefix]`; empty: a folder in home.")
    store_endpoint: str = Field("", description="Endpoint of the S3 store, such as `http://minio:9000`.")
    store_access_key: str = Field("", description="Access key of the S3 store.")
    store_secret_key: SecretStr = Field(SecretStr(""), description="Secret key of the S3 store.")
    store_region: str = Field("us-east-1", description="Region of the S3 store.")
    mlflow_tracking_uri: str = Field(
        "",
        validation_alias=AliasChoices("MLFLOW_TRACKING_URI", "LAWNWATCH_MLFLOW_TRACKING_URI", "mlflow_tracking_uri"),
        repr=False,  # MLflow takes a password in it
        description="MLflow server; empty: SQLite in home. Read from `MLFLOW_TRACKING_URI`.",
    )
    model_name: str = Field("lawnwatch", description="Name of the registered model.")
    weights: str = Field(
        "imagenet",
        description="Where MobileNetV2 starts: `imagenet` (Keras downloads it), a weights file, or `none`.",
    )
    api_url: str = Field("http://127.0.0.1:8000", description="Where the web app and the rollout find the API.")
    api_key: SecretStr | None = Field(
        None,
        description="Key that the rollout shows the API for its golden pictures, where the API requires one: scope "
        "`predict`.",
    )
    public_url: str = Field(
        "",
        description="Where a person's browser reaches the API: the address of links to reports; empty: "
        "`LAWNWATCH_API_URL`.",
    )
    log_level: str = Field("INFO", description="Lowest level logged.")
    log_json: bool | None = Field(None, description="JSON log lines; unset: when stderr is not a terminal.")
    git_commit: str = Field("", description="Commit of the running code; empty: asked of git. Images set it.")
    metrics_dir: Path | None = Field(
        None,
        description="Folder for the ingest's metrics, for Prometheus' textfile collector; unset: nowhere.",
    )
    step_resources: dict[str, StepResources] = Field(
        {},
        description="On Kubernetes: what a step's pod asks for, by the step's first word, such as "
        '`{"train": {"cpu": "1", "memory": "3Gi"}}`, and on which nodes it runs (`nodeSelector`, `tolerations`); the '
        "others ask for what `pipeline.py` says.",
    )
    run_id: str = Field("", description="Bound to every log line; Airflow's tasks set it to the DAG run's id.")
    fetch: FetchSettings = FetchSettings()
    images: ImageSettings = ImageSettings()
    data: DataSettings = DataSettings()
    quality: QualitySettings = QualitySettings()
    train: TrainSettings = TrainSettings()
    gate: GateSettings = GateSettings()
    serving: ServingSettings = ServingSettings()
    rollout: RolloutSettings = RolloutSettings()
    exporter: ExporterSettings = ExporterSettings()

    @model_validator(mode="after")
    def _settle(self) -> Settings:
        self.home = self.home.expanduser().absolute()
        if not self.database_url.get_secret_value():
            self.database_url = SecretStr(f"sqlite:///{self.home / 'catalog.db'}")
        if not self.store_url:
            self.store_url = f"file://{self.home / 'store'}"
        if not self.mlflow_tracking_uri:
            self.mlflow_tracking_uri = f"sqlite:///{self.home / 'mlflow.db'}"
        if not self.public_url:
            self.public_url = self.api_url
        self._refuse_known_passwords()
        if self.environment == "production" and (self.fetch.allow_cidrs or self.fetch.origin_map):
            raise ValueError(
                "LAWNWATCH_FETCH__ALLOW_CIDRS and LAWNWATCH_FETCH__ORIGIN_MAP are for development only; "
                "unset them, or set LAWNWATCH_ENVIRONMENT=development"
            )
        return self

    def _refuse_known_passwords(self) -> None:
        """The embedded mode has no passwords; every real server must have one that is not known to all."""
        database = urlsplit(self.database_url.get_secret_value())
        if not database.scheme.startswith("sqlite") and unquote(database.password or "").lower() in PLACEHOLDERS:
            raise ValueError("LAWNWATCH_DATABASE_URL has a blank or well-known password; choose one of your own")
        if self.store_url.startswith("s3://"):
            if not self.store_endpoint:
                raise ValueError("LAWNWATCH_STORE_URL names an S3 bucket; set LAWNWATCH_STORE_ENDPOINT to its server")
            if self.store_secret_key.get_secret_value().lower() in PLACEHOLDERS:
                raise ValueError("LAWNWATCH_STORE_SECRET_KEY is blank or well-known; choose one of your own")
        elif not self.store_url.startswith("file://"):
            # Only the scheme: somebody may have put a password into the rest.
            scheme = self.store_url.partition(":")[0] if ":" in self.store_url else "no scheme"
            raise ValueError(f"LAWNWATCH_STORE_URL must begin with s3:// or file://; received {scheme}")


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        SettingsError: a setting is malformed, or unsafe in this environment; the message never holds its value.
    """
    try:
        return Settings()
    except UnreadableSettings as error:
        # A list or an object that is not JSON. Its text names the setting; its cause holds the value, so it is cut off.
        raise SettingsError(
            f"The settings are not usable: {error}.", hint="docs/settings.md lists every setting."
        ) from None
    except ValidationError as error:
        faults = "; ".join(
            (("LAWNWATCH_" + "__".join(map(str, fault["loc"])).upper() + ": ") if fault["loc"] else "")
            + fault["msg"].removeprefix("Value error, ")
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(
            f"The settings are not usable: {faults}.", hint="docs/settings.md lists every setting."
        ) from None
