"""The sole reader of environment variables and settings files.

Sources, highest first:

1. environment: `DPDL_<GROUP>_<FIELD>`, e.g. `DPDL_KAFKA_BOOTSTRAP`; a secret may also be named
   by file, e.g. `DPDL_REDIS_PASSWORD_FILE`. An empty variable counts as not set, and so does what
   Kubernetes sets for a Service whose name begins with `dpdl`.
2. `dpdl.yaml`: `DPDL_CONFIG` names it, else ./dpdl.yaml where there is one. Relative paths in it
   are relative to it.
3. `<state_dir>/services.yaml`: written by the embedded services, mode 0600.
4. the defaults below.

services.yaml describes a service as a whole: once a higher source says where Kafka, Redis or S3
is, the embedded one's address *and* credentials are left out, so its password is never sent to
someone else's server.

Settings never travel between processes (pickling one is refused): workers call load_settings()
again, and only `worker_env()`, which holds two paths, is handed to them.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from infra.errors import SettingsError

CONFIG_VARIABLE = "DPDL_CONFIG"
_PREFIX = "DPDL_"
_SERVICE_LINK = re.compile(
    r"\w+_SERVICE_(HOST|PORT(_\w+)?)=.*"
    r"|\w+_PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://.*"
    r"|\w+_PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.*"
)
"""Of a Service dpdl-redis kubelet tells every pod of its namespace DPDL_REDIS_PORT=tcp://..."""
_ENDPOINTS = {"kafka": ("bootstrap",), "redis": ("host", "port"), "s3": ("endpoint",)}

Port = Annotated[int, Field(ge=1, le=65535)]


class _Group(BaseModel):
    # hide_input_in_errors: pydantic would print a mistyped password.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class KafkaSettings(_Group):
    bootstrap: str = ""
    """HOST:PORT, comma-separated. Empty: no Kafka is known yet."""
    topic: str = "dpdl.frames"
    dead_topic: str = "dpdl.frames.dead"
    partitions: int = Field(default=4, ge=1)
    """Of topics that we create; also the most consumers that can share the work."""
    replication: int = Field(default=1, ge=1)
    """Replication factor of topics that we create; 3 in production."""
    retention_hours: float = Field(default=24.0, gt=0)
    retention_mb: int = Field(default=2048, ge=1)
    """Per partition, of topics that we create. Whichever bound comes first deletes."""
    dead_retention_hours: float = Field(default=720.0, gt=0)
    """Of the dead letters, which a person looks at: a month, beside retention_mb."""
    group: str = "dpdl"
    """Whose progress it is; in Kafka an id of the Redis is added, and an ACL wants the prefix."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"] = "SCRAM-SHA-512"
    sasl_username: str = ""
    sasl_password: SecretStr | None = None
    tls_ca: Path | None = None
    """PEM of the authority that signed the brokers' certificates; the system's where unset."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_check_hostname: bool = True

    @model_validator(mode="after")
    def _complete(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and not (
            self.sasl_username and self.sasl_password
        ):
            raise ValueError(
                f"{self.security_protocol} needs kafka.sasl_username and kafka.sasl_password"
            )
        return self


class RedisSettings(_Group):
    host: str = ""
    """Empty: no Redis is known yet."""
    port: Port = 6379
    db: int = Field(default=0, ge=0)
    username: str = ""
    """ACL user; empty is Redis's own `default` user."""
    password: SecretStr | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_check_hostname: bool = True
    prefix: str = Field(default="dpdl", pattern=r"^[A-Za-z0-9_.-]+$")
    """First part of every key, so that several lines can share one Redis."""


class S3Settings(_Group):
    endpoint: str = ""
    """HOST:PORT with no scheme. Empty: no S3 is known yet."""
    access_key: str = ""
    secret_key: SecretStr | None = None
    region: str = "us-east-1"
    secure: bool = False
    """https instead of http."""
    tls_ca: Path | None = None
    data_bucket: str = "dpdl-data"
    models_bucket: str = "dpdl-models"
    evidence_bucket: str = "dpdl-evidence"

    @field_validator("endpoint")
    @classmethod
    def _no_scheme(cls, value: str) -> str:
        if "://" in value or "/" in value:
            raise ValueError("HOST:PORT is wanted, with no scheme and no path; https is s3.secure")
        return value

    @model_validator(mode="after")
    def _apart(self) -> S3Settings:
        names = {self.data_bucket, self.models_bucket, self.evidence_bucket}
        if len(names) < 3:
            raise ValueError(
                "data_bucket, models_bucket and evidence_bucket must be three: what lies in the "
                "last expires"
            )
        return self


class StreamSettings(_Group):
    max_batch: int = Field(default=32, ge=1, le=1024)
    """Frames per scoring call; memory grows linearly."""
    max_wait_s: float = Field(default=0.02, ge=0)
    """Longest a lone frame waits for company; adds directly to latency."""
    max_in_flight: int = Field(default=4, ge=1)
    """Batches between poll and publish, per consumer: bounds memory whatever the lag."""
    decode_threads: int = Field(default=2, ge=1)
    alert_k: int = Field(default=1, ge=1)
    """An anomalous frame is an alert when at least k of its camera's last n were anomalous."""
    alert_n: int = Field(default=1, ge=1, le=100)
    scores_kept: int = Field(default=10_000, ge=1)
    """Results kept per camera; trimmed approximately, a little more may stay."""
    alerts_kept: int = Field(default=100_000, ge=1)
    max_cameras: int = Field(default=10_000, ge=1)
    """Camera ids come from outside: frames of further ones are scored and raise alerts, but they
    are not listed and their scores are not kept. Each listed camera takes Redis about 1 KB, and
    300 bytes per result kept."""
    max_models: int = Field(default=4, ge=1)
    """Models that a scorer holds at a time: the default one and those that cameras are bound to."""
    evidence_days: int = Field(default=30, ge=1)
    """Evidence in S3 expires after this many days."""

    @model_validator(mode="after")
    def _k_of_n(self) -> StreamSettings:
        if self.alert_k > self.alert_n:
            raise ValueError(f"stream.alert_k={self.alert_k} is more than alert_n={self.alert_n}")
        return self


class ServeSettings(_Group):
    http_host: str = "127.0.0.1"
    http_port: Port = 8000
    token: SecretStr | None = None
    """Asked of every HTTP caller; wanted for an address that is not loopback."""
    min_consumers: int = Field(default=1, ge=1)
    max_consumers: int = Field(default=0, ge=0)
    """Consumer replicas follow Kafka's lag between these bounds, never more than partitions.
    0: one per eight CPUs that the cluster has when the stream is deployed."""
    lag_per_consumer: int = Field(default=500, ge=1)
    """Frames of lag that one consumer may have: as many replicas are wanted as it takes."""
    min_scorers: int = Field(default=1, ge=1)
    max_scorers: int = Field(default=0, ge=0)
    """Scorer replicas follow their queue between these bounds. 0: as many as min_scorers."""

    @property
    def url(self) -> str:
        """Of the console and its API."""
        host = f"[{self.http_host}]" if ":" in self.http_host else self.http_host
        return f"http://{host}:{self.http_port}/"

    @model_validator(mode="after")
    def _bounds(self) -> ServeSettings:
        for what in ("consumers", "scorers"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if high and low > high:
                raise ValueError(f"serve.min_{what}={low} is more than serve.max_{what}={high}")
        return self


class GrafanaSettings(_Group):
    url: str = ""
    """http(s)://HOST[:PORT] of a Grafana; promotions and rollbacks are annotated there."""
    token: SecretStr | None = None
    """Of a service account with the role Editor; `dpdl dashboards push` wants Admin."""


class EmbeddedSettings(_Group):
    """Of the services that `dpdl up` and `dpdl demo` start on this machine."""

    kafka_port: Port | None = None
    """A port that must be used; where unset a free one is chosen and remembered."""
    s3_port: Port | None = None
    redis_port: Port | None = None
    cache_dir: Path = Path.home() / ".cache" / "dpdl"
    """Kafka's jars, fetched once."""


class Settings(_Group):
    """Everything configurable, validated once. Build it with load_settings()."""

    state_dir: Path = Path(".dpdl")
    kafka: KafkaSettings = KafkaSettings()
    redis: RedisSettings = RedisSettings()
    s3: S3Settings = S3Settings()
    stream: StreamSettings = StreamSettings()
    serve: ServeSettings = ServeSettings()
    grafana: GrafanaSettings = GrafanaSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()

    _config_file: Path | None = PrivateAttr(default=None)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where a value such as "redis.port" came from: a variable's or file's name, "default"."""
        return self._origins.get(key, "default")

    def is_external(self, service: Literal["kafka", "redis", "s3"]) -> bool:
        """True where a person configured this service, so that no embedded one is wanted."""
        return bool(self.configured_by(service))

    def configured_by(self, service: Literal["kafka", "redis", "s3"]) -> str:
        """The variable or file by which a person did so; "" where none did."""
        ours = {"default", str(services_file(self.state_dir))}
        found = (self.origin(f"{service}.{field}") for field in _ENDPOINTS[service])
        return next((origin for origin in found if origin not in ours), "")

    def unknown(self, service: str, variables: str) -> SettingsError:
        """For a service whose address no source says."""
        return SettingsError(
            f"no {service} is known in {self.state_dir}: start the embedded services with "
            "`dpdl up`, set DPDL_STATE_DIR where they were started from another folder, or set "
            f"{variables}"
        )

    def redacted(self) -> dict[str, Any]:
        """Plain data for people and logs: secrets that are set show as "***"."""
        shown: dict[str, Any] = {}
        for key, value in _leaves(self):
            group, _, field = key.rpartition(".")
            target = shown.setdefault(group, {}) if group else shown
            if isinstance(value, SecretStr):
                value = "***"
            target[field] = str(value) if isinstance(value, Path) else value
        return shown

    def worker_env(self) -> dict[str, str]:
        """Variables with which load_settings() in a worker process finds the same files."""
        env = {"DPDL_STATE_DIR": str(self.state_dir)}
        if self._config_file is not None:
            env[CONFIG_VARIABLE] = str(self._config_file)
        return env

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Settings hold secrets and do not travel: call load_settings() in the worker, and "
            "pass settings.worker_env() as its environment"
        )


def services_file(state_dir: Path) -> Path:
    """Where the embedded services say how they are reached."""
    return state_dir / "services.yaml"


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read all sources. SettingsError in one line, naming the key and where it stands."""
    environ = os.environ if environ is None else environ
    config_file = _config_file(environ)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def add(layer: Mapping[str, Any], source: str | None = None) -> None:
        for key, (value, origin) in layer.items():
            if key not in values:
                values[key], origins[key] = value, source or origin

    add(_from_environment(environ))
    if config_file is not None:
        add(_from_yaml(config_file))
    state_dir = Path(values.get("state_dir", ".dpdl")).expanduser().absolute()
    values["state_dir"] = state_dir
    services = services_file(state_dir)
    if _exists(services):
        add(_embedded_only(_from_yaml(services), origins))

    try:
        settings = Settings.model_validate(_nested(values))
    except ValidationError as error:
        raise SettingsError(_one_line(error, origins)) from None
    settings._config_file = config_file
    settings._origins.update(origins)
    return settings


def _config_file(environ: Mapping[str, str]) -> Path | None:
    named = environ.get(CONFIG_VARIABLE)
    path = Path(named or "dpdl.yaml").expanduser().absolute()
    if path.is_file():
        return path
    if named:
        raise SettingsError(f"{CONFIG_VARIABLE}={named}: no such file. Create it or unset it")
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder of another user
        raise SettingsError(f"{path}: {error.strerror}. Set DPDL_STATE_DIR to your own") from None


_Layer = dict[str, tuple[Any, str]]
"""Dotted key -> value, and the name of where it came from."""


def _from_environment(environ: Mapping[str, str]) -> _Layer:
    names = {_PREFIX + key.upper().replace(".", "_"): key for key in _KEYS}
    files = {f"{name}_FILE": key for name, key in names.items() if _is(key, SecretStr)}
    layer: _Layer = {}
    for name, value in sorted(environ.items()):
        if not name.startswith(_PREFIX) or name == CONFIG_VARIABLE or value == "":
            continue
        if _SERVICE_LINK.fullmatch(f"{name}={value}"):
            continue
        if name in names:
            layer[names[name]] = (value, name)
        elif name not in files:
            raise SettingsError(_unknown(name, "environment", [*names, *files, CONFIG_VARIABLE]))
        elif environ.get(name.removesuffix("_FILE")):
            raise SettingsError(f"{name} and {name.removesuffix('_FILE')} are both set: keep one")
        else:
            layer[files[name]] = (_secret_from(Path(value).expanduser(), name), name)
    return layer


def _secret_from(path: Path, name: str) -> str:
    try:
        require_private(path)
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{name}={path}: cannot read it ({error})") from None
    if not secret:
        raise SettingsError(f"{name}={path}: the file is empty, a secret is wanted")
    return secret


def _from_yaml(path: Path) -> _Layer:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot read it ({error})") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: {no_yaml(error)}") from None
    layer: _Layer = {}
    for key, value in _flat(content, path):
        if key not in _KEYS:
            raise SettingsError(_unknown(key, str(path), _KEYS))
        if value is None:
            continue
        if _is(key, SecretStr):
            require_private(path, forbidden=0o077, wanted="0600")
            if not isinstance(value, str):  # to YAML 0123 is 83, and yes is true
                raise SettingsError(f"{key} in {path} is no text to YAML: put it in quotes")
        if _is(key, Path):
            value = path.parent / Path(str(value)).expanduser()
        layer[key] = (value, str(path))
    return layer


def no_yaml(error: yaml.YAMLError) -> str:
    """Where a text is no YAML, without a word of it: PyYAML quotes the line, passwords and all."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"no YAML{where}: put text with other characters than letters and digits in quotes"


def _flat(content: object, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: found {type(content).__name__}, wanted groups of settings")
    for name, value in content.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{field}", inner) for field, inner in value.items())
        elif value is not None or name not in Settings.model_fields:
            yield str(name), value


def _embedded_only(layer: _Layer, origins: Mapping[str, str]) -> _Layer:
    """Leave out the services whose place a higher source names."""
    elsewhere = {
        group
        for group, fields in _ENDPOINTS.items()
        if any(f"{group}.{field}" in origins for field in fields)
    }
    return {key: value for key, value in layer.items() if key.split(".")[0] not in elsewhere}


def require_private(
    path: Path, *, forbidden: int = 0o027, wanted: str = "0640 or stricter"
) -> None:
    """SettingsError where others may read a file with a secret; OSError where it is not there.

    Group may read: Kubernetes mounts secrets for a group (defaultMode: 0440).
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & forbidden:
        raise SettingsError(
            f"{path} holds a secret and has mode {mode:04o}, wanted {wanted}: chmod 600 {path}"
        )


def _unknown(name: str, where: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    shown = (name if name.isprintable() else ascii(name))[:200]  # one line, whatever YAML holds
    return f"{shown} in {where} is not a setting; the nearest is {near}. Rename or remove it"


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    first, *more = error.errors(include_url=False, include_input=False, include_context=False)
    key = ".".join(str(part) for part in first["loc"])
    origin = f" ({origins[key]})" if key in origins else ""
    others = f" (and {len(more)} more)" if more else ""
    return f"{key or 'settings'}{origin}: {first['msg'].removeprefix('Value error, ')}{others}"


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        group, _, field = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[field] = value
    return nested


def _leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is(key: str, wanted: type) -> bool:
    """Whether a dotted key's field holds this type (or None)."""
    model: type[BaseModel] = Settings
    *groups, field = key.split(".")
    for group in groups:
        model = type(model.model_fields[group].default)
    annotation = model.model_fields[field].annotation
    return annotation is wanted or wanted in get_args(annotation)


_KEYS: list[str] = [key for key, _ in _leaves(Settings())]


def referred_secret(reference: str) -> str:
    """What `env:NAME` or `file:PATH` refers to, stripped.

    SettingsError when there is none, or when others may read the file.
    """
    kind, _, name = reference.partition(":")
    if kind == "env":
        found = os.environ.get(name, "")
    else:
        try:
            require_private(Path(name))
            found = Path(name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise SettingsError(f"{reference}: {reason}") from None
    if not found.strip():
        raise SettingsError(f"{reference}: empty or not set")
    return found.strip()


def is_setting(variable: str) -> bool:
    """Whether this environment variable sets something here, `DPDL_CONFIG` included."""
    return variable == CONFIG_VARIABLE or _key(variable) is not None


def is_secret(variable: str) -> bool:
    """Whether this environment variable would hold a secret itself, not the name of its file."""
    key = _key(variable)
    return key is not None and _is(key, SecretStr)


def _key(variable: str) -> str | None:
    names = {_PREFIX + key.upper().replace(".", "_"): key for key in _KEYS}
    return names.get(variable)
