"""Settings: where values come from, what is refused, and that no secret gets out."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import SecretStr

from infra.errors import SettingsError
from infra.kafka_client import make_admin
from infra.redis_connection import make_redis
from infra.s3_client import make_minio
from infra.settings import Settings, load_settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, content: object, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    path.chmod(mode)
    return path


def test_every_source_gives_way_to_the_one_above_it(home: Path) -> None:
    write(
        home / ".dpdl" / "services.yaml",
        {"stream": {"max_batch": 1, "decode_threads": 1, "alert_n": 5}},
    )
    write(home / "dpdl.yaml", {"stream": {"max_batch": 2, "decode_threads": 2}})
    stream = load_settings({"DPDL_STREAM_MAX_BATCH": "3"}).stream
    assert (stream.max_batch, stream.decode_threads, stream.alert_n) == (3, 2, 5)
    assert stream.alert_k == 1


def test_origin_says_where_a_value_came_from(home: Path) -> None:
    path = write(home / "dpdl.yaml", {"redis": {"port": 7000}})
    settings = load_settings({"DPDL_REDIS_HOST": "r"})
    assert settings.origin("redis.host") == "DPDL_REDIS_HOST"
    assert settings.origin("redis.port") == str(path)
    assert settings.origin("redis.db") == "default"


SERVICES = {
    "kafka": {"bootstrap": "127.0.0.1:1", "sasl_username": "dpdl", "sasl_password": "hunter2"},
    "redis": {"host": "127.0.0.1", "port": 2, "password": "hunter2"},
    "s3": {"endpoint": "127.0.0.1:3", "access_key": "AK", "secret_key": "hunter2"},
}


def test_the_embedded_services_are_found(home: Path) -> None:
    write(home / ".dpdl" / "services.yaml", SERVICES)
    settings = load_settings({})
    assert settings.kafka.bootstrap == "127.0.0.1:1"
    assert settings.redis.password == SecretStr("hunter2")
    assert not any(settings.is_external(name) for name in ("kafka", "redis", "s3"))


@pytest.mark.parametrize(
    ("variable", "value", "service"),
    [
        ("DPDL_KAFKA_BOOTSTRAP", "plant:9092", "kafka"),
        ("DPDL_REDIS_HOST", "plant", "redis"),
        ("DPDL_REDIS_PORT", "6380", "redis"),
        ("DPDL_S3_ENDPOINT", "plant:9000", "s3"),
    ],
)
def test_an_embedded_password_is_never_sent_to_another_server(
    home: Path, variable: str, value: str, service: str
) -> None:
    write(home / ".dpdl" / "services.yaml", SERVICES)
    settings = load_settings({variable: value})
    assert "hunter2" not in revealed(settings, service)
    assert settings.is_external(service)  # type: ignore[arg-type]
    others = {"kafka", "redis", "s3"} - {service}
    assert all("hunter2" in revealed(settings, other) for other in others)


def revealed(settings: Settings, service: str) -> list[object]:
    values = [value for _, value in getattr(settings, service)]
    return [v.get_secret_value() if isinstance(v, SecretStr) else v for v in values]


def test_a_topic_alone_does_not_make_a_service_external(home: Path) -> None:
    write(home / ".dpdl" / "services.yaml", SERVICES)
    settings = load_settings({"DPDL_KAFKA_TOPIC": "other"})
    assert settings.kafka.bootstrap == "127.0.0.1:1"
    assert not settings.is_external("kafka")


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"DPDL_KAFAK_BOOTSTRAP": "x"}, "DPDL_KAFKA_BOOTSTRAP"),
        ({"DPDL_REDIS_PASWORD_FILE": "x"}, "DPDL_REDIS_PASSWORD_FILE"),
        ({"DPDL_STATEDIR": "x"}, "DPDL_STATE_DIR"),
        ({"DPDL_KAFKA_BOOTSTRAP_FILE": "x"}, "DPDL_KAFKA_BOOTSTRAP"),
    ],
)
def test_a_misspelled_variable_names_the_nearest(
    home: Path, environ: dict[str, str], wanted: str
) -> None:
    with pytest.raises(SettingsError, match=rf"{next(iter(environ))} .*nearest is {wanted}\."):
        load_settings(environ)


@pytest.mark.parametrize("service", ["", "REDIS_", "SERVE_SVC_"])
def test_what_kubernetes_sets_for_a_service_is_no_setting(home: Path, service: str) -> None:
    """Its documentation, "Accessing the Service": the variables of a Service dpdl-redis."""
    name = f"DPDL_{service}"
    links = {
        f"{name}SERVICE_HOST": "10.0.0.11",
        f"{name}SERVICE_PORT": "6379",
        f"{name}SERVICE_PORT_SERVE": "8000",
        f"{name}PORT": "tcp://10.0.0.11:6379",
        f"{name}PORT_6379_TCP": "tcp://10.0.0.11:6379",
        f"{name}PORT_6379_TCP_PROTO": "tcp",
        f"{name}PORT_6379_TCP_PORT": "6379",
        f"{name}PORT_6379_TCP_ADDR": "10.0.0.11",
    }
    assert load_settings(links) == load_settings({})


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"kafka": {"bootstrp": "x"}}, r"kafka\.bootstrp .*nearest is kafka\.bootstrap"),
        ({"kafak": {"bootstrap": "x"}}, r"kafak\.bootstrap .*nearest is kafka\.bootstrap"),
        ({"state": "x"}, r"state .*nearest is state_dir"),
        ("- a list", "found list, wanted groups"),
        ("a: [", "no YAML in line 1"),
        ({"redis": 5}, "redis in .* is not a setting"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(home: Path, content: object, found: str) -> None:
    path = write(home / "dpdl.yaml", content)
    with pytest.raises(SettingsError, match=found) as raised:
        load_settings({})
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({"DPDL_REDIS_PORT": "abc"}, r"redis\.port \(DPDL_REDIS_PORT\): .*integer"),
        ({"DPDL_REDIS_PORT": "70000"}, r"redis\.port \(DPDL_REDIS_PORT\): .*65535"),
        ({"DPDL_S3_ENDPOINT": "http://s3"}, r"s3\.endpoint .*s3\.secure"),
        ({"DPDL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, r"SASL_SSL needs kafka\.sasl_username"),
        ({"DPDL_STREAM_ALERT_K": "3"}, r"alert_k=3 is more than alert_n=1"),
        ({"DPDL_CONFIG": "nowhere.yaml"}, r"DPDL_CONFIG=nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_value_names_its_key_and_source(
    home: Path, environ: dict[str, str], found: str
) -> None:
    with pytest.raises(SettingsError, match=found) as raised:
        load_settings(environ)
    assert "\n" not in str(raised.value)


def test_what_expires_has_a_bucket_of_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPDL_S3_EVIDENCE_BUCKET", "dpdl-models")
    with pytest.raises(SettingsError, match="must be three"):
        load_settings()


def test_a_secret_comes_from_a_file(home: Path) -> None:
    secret = write(home / "pw", "hunter2\n", mode=0o640)
    settings = load_settings({"DPDL_REDIS_PASSWORD_FILE": str(secret)})
    assert settings.redis.password == SecretStr("hunter2")


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_secret_file_that_others_reach_is_refused(home: Path, mode: int) -> None:
    secret = write(home / "pw", "hunter2", mode)
    with pytest.raises(SettingsError, match=rf"mode {mode:04o}.*chmod 600") as raised:
        load_settings({"DPDL_REDIS_PASSWORD_FILE": str(secret)})
    assert "hunter2" not in str(raised.value)


def test_a_secret_is_named_once(home: Path) -> None:
    secret = write(home / "pw", "a")
    both = {"DPDL_REDIS_PASSWORD_FILE": str(secret), "DPDL_REDIS_PASSWORD": "b"}
    with pytest.raises(SettingsError, match="both set"):
        load_settings(both)


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_secret_file_is_refused(home: Path, content: str) -> None:
    secret = write(home / "pw", content)
    with pytest.raises(SettingsError, match="empty"):
        load_settings({"DPDL_REDIS_PASSWORD_FILE": str(secret)})


@pytest.mark.parametrize("name", ["dpdl.yaml", ".dpdl/services.yaml"])
def test_a_yaml_with_secrets_must_be_private(home: Path, name: str) -> None:
    write(home / name, {"redis": {"password": "hunter2"}}, mode=0o640)
    with pytest.raises(SettingsError, match=r"0640, wanted 0600"):
        load_settings({})


@pytest.mark.parametrize("password", ["0123456", "yes", "1_000", "2026-11-28", "1.5"])
def test_a_secret_that_yaml_takes_for_something_else_is_refused(home: Path, password: str) -> None:
    """What YAML makes of it, 42798 of the first, would be sent as the password."""
    path = write(home / "dpdl.yaml", f"redis:\n  password: {password}\n")
    with pytest.raises(SettingsError, match=r"redis\.password .*put it in quotes") as raised:
        load_settings({})
    assert password not in str(raised.value)
    write(path, f"redis:\n  password: '{password}'\n")
    assert load_settings({}).redis.password == SecretStr(password)


def test_a_yaml_without_secrets_may_be_public(home: Path) -> None:
    write(home / "dpdl.yaml", {"redis": {"port": 7000}}, mode=0o644)
    assert load_settings({}).redis.port == 7000


def test_paths_in_a_file_are_relative_to_it(home: Path) -> None:
    path = write(home / "etc" / "plant.yaml", {"state_dir": "state", "kafka": {"tls_ca": "ca.pem"}})
    settings = load_settings({"DPDL_CONFIG": str(path)})
    assert settings.kafka.tls_ca == home / "etc" / "ca.pem"
    assert settings.state_dir == home / "etc" / "state"


def test_a_worker_finds_the_same_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home / "state" / "services.yaml", SERVICES)
    write(home / "dpdl.yaml", {"state_dir": "state", "redis": {"prefix": "line1"}})
    settings = load_settings({})
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = load_settings(settings.worker_env())
    assert again.model_dump() == settings.model_dump()
    assert "hunter2" not in str(settings.worker_env())


def test_settings_do_not_travel() -> None:
    with pytest.raises(TypeError, match="load_settings"):
        pickle.dumps(Settings())


def test_no_secret_is_shown(home: Path) -> None:
    write(home / ".dpdl" / "services.yaml", SERVICES)
    settings = load_settings({"DPDL_SERVE_TOKEN": "hunter2"})
    for shown in (str(settings.redacted()), repr(settings), str(settings.kafka)):
        assert "hunter2" not in shown
    assert settings.redacted()["redis"]["password"] == "***"
    assert settings.redacted()["serve"]["token"] == "***"
    assert load_settings({}).redacted()["serve"]["token"] is None


def test_a_mistyped_secret_is_not_echoed(home: Path) -> None:
    write(home / "dpdl.yaml", {"redis": {"password": ["hunter2"], "port": "x"}})
    with pytest.raises(SettingsError) as raised:
        load_settings({})
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "slip", ["'hunter2", '"hunter2', "@hunter2", "*hunter2", "!hunter2 x", "a: hunter2", "[hunter2"]
)
def test_a_slip_in_yaml_does_not_print_the_password(home: Path, slip: str) -> None:
    (home / "dpdl.yaml").write_text(f"redis:\n  host: r\n  password: {slip}\n")
    (home / "dpdl.yaml").chmod(0o600)
    with pytest.raises(SettingsError) as raised:
        load_settings({})
    assert "hunter2" not in str(raised.value)


text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40
)


@given(value=text)
def test_text_in_a_variable_arrives_as_it_is(value: str) -> None:
    """No JSON, no expansion, no stripping: a password may look like anything."""
    environ = {
        "DPDL_REDIS_PASSWORD": value,
        "DPDL_KAFKA_GROUP": value,
        "DPDL_REDIS_USERNAME": value,
    }
    settings = load_settings({**environ, "DPDL_STATE_DIR": "/nonexistent"})
    assert settings.redis.password is not None
    assert settings.redis.password.get_secret_value() == value
    assert settings.kafka.group == settings.redis.username == value


@given(name=st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ_", max_size=30), value=text)
def test_a_variable_is_a_setting_or_an_error(name: str, value: str) -> None:
    """Never silently ignored: either it is somewhere in the settings or it is named."""
    variable = f"DPDL_{name}"
    refused, origins = "", set()
    try:
        settings = load_settings({variable: value, "DPDL_STATE_DIR": "/nonexistent"})
        origins = set(settings._origins.values())
    except SettingsError as error:
        refused = str(error)
    assert "\n" not in refused
    assert refused or variable in origins


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.lists(text))
groups = st.sampled_from([*Settings.model_fields, "nonsense"])
fields = st.one_of(st.sampled_from(["port", "topic", "max_batch", "password", "tls_ca"]), text)


@given(content=st.dictionaries(groups, st.one_of(leaves, st.dictionaries(fields, leaves))))
@example(content={"state_dir": {"\n": None}})
def test_any_yaml_is_settings_or_one_line(
    content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.touch(0o600)
    path.write_text(yaml.safe_dump(content))
    said = ""
    try:
        load_settings({"DPDL_CONFIG": str(path), "DPDL_STATE_DIR": "/nonexistent"})
    except SettingsError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("service", "connect"),
    [("Kafka", make_admin), ("Redis", make_redis), ("S3", make_minio)],
)
def test_where_no_service_is_known_the_folder_that_was_looked_at_is_named(
    home: Path, service: str, connect: Callable[[Settings], Any]
) -> None:
    with pytest.raises(SettingsError, match=f"no {service} is known in {home}/.dpdl: .*STATE_DIR"):
        connect(load_settings({}))
