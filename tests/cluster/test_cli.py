"""The command line: reports, key=value pairs, exit codes. No services, no network."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from cluster import cli
from cluster.commands.shared import check_device, duration, key_values, write_report
from infra.errors import DpdlError
from pipelines import refresh
from pipelines.refresh import RefreshReport
from serving import app as stream_app


def dpdl(*args, cwd, **env):
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *args],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if not k.startswith("DPDL_")} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_key_values_keeps_what_follows_the_first_equals_sign():
    assert key_values(["a=1", "b = x=y"]) == {"a": "1", "b": "x=y"}
    assert key_values(None) == {}


def test_key_values_names_the_pair_that_is_none():
    with pytest.raises(ValueError, match="--set eps: wanted key=value"):
        key_values(["eps"])


def test_durations_have_a_unit():
    assert [duration(t) for t in ("30s", "15m", "6h", "1.5d")] == [30, 900, 21600, 129600]
    for wrong in ("6", "h", "0s", "-1h", "6 hours"):
        with pytest.raises(typer.BadParameter, match="30s, 15m, 6h"):
            duration(wrong)


def test_refresh_takes_one_of_once_every_and_watch(tmp_path):
    done = dpdl("refresh", "--every", "6h", "--watch", cwd=tmp_path)
    assert done.returncode == 1
    assert "choose one" in done.stderr


def test_a_device_that_is_not_there_is_told_before_any_work(tmp_path):
    for text in ("", "cpu"):
        check_device(text)
    with pytest.raises(ValueError, match="--device foo: wanted cpu, cuda or cuda:N"):
        check_device("foo")
    with pytest.raises(ValueError, match="--device cuda:999: PyTorch finds"):
        check_device("cuda:999")
    for command in (["evaluate", "--data", "elpv"], ["bench", "score"], ["refresh", "--once"]):
        done = dpdl(*command, "--device", "foo", cwd=tmp_path)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1)
        assert "wanted cpu, cuda" in done.stderr


def test_a_report_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "report.json"
    write_report(path, {"a": 1.5})
    assert json.loads(path.read_text()) == {"a": 1.5}
    with pytest.raises(TypeError):
        write_report(path, {("not", "a key"): 1})
    assert json.loads(path.read_text()) == {"a": 1.5}


def test_an_expected_failure_is_one_line_and_exit_code_1(tmp_path):
    done = dpdl("alerts", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "dpdl up" in done.stderr


def test_serve_ends_as_a_failure_when_its_application_is_gone(tmp_path, monkeypatch):
    """So that whoever looks after the process, as systemd does, starts it again."""
    deployed = SimpleNamespace(version="v1", device="cuda", url="http://127.0.0.1:8000/")
    asked = []

    def deploy(settings, *, device, deadline_s, **_):
        asked.append((device, deadline_s))
        return deployed

    def gone():
        raise DpdlError("the stream application of this command was deleted")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream_app, "deploy", deploy)
    monkeypatch.setattr(stream_app, "check_ours", gone)
    monkeypatch.setattr(sys, "argv", ["dpdl", "serve", "--device", "cuda"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert asked == [("cuda", 1800.0)]  # its machine may be yet to come


def test_a_misspelt_setting_is_named(tmp_path):
    done = dpdl("config", cwd=tmp_path, DPDL_REDIS_PROT="1")
    assert done.returncode == 1
    assert "DPDL_REDIS_PROT" in done.stderr
    assert "DPDL_REDIS_PORT" in done.stderr


def test_config_hides_secrets(tmp_path):
    done = dpdl(
        "config", cwd=tmp_path, DPDL_REDIS_HOST="redis.example", DPDL_REDIS_PASSWORD="open-sesame"
    )
    assert done.returncode == 0
    assert "redis.example" in done.stdout
    assert "open-sesame" not in done.stdout + done.stderr


def test_every_command_in_the_readme_exists(tmp_path):
    done = dpdl("--help", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("demo", "up", "down", "status", "train", "refresh", "serve", "stream", "alerts"):
        assert name in done.stdout


def test_train_wants_a_data_set_or_a_run_to_resume(tmp_path):
    for wrong in ([], ["--dataset", "d", "--resume", "train-0"]):
        done = dpdl("train", *wrong, cwd=tmp_path)
        assert done.returncode == 1
        assert "either --dataset NAME, or --resume RUN" in done.stderr
    idle = ["--resume", "train-0", "--seed", "0", "--set", "eps=1", "--false-alarm-rate", ".1"]
    done = dpdl("train", *idle, "--model", "m", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "leave out --false-alarm-rate, --seed, --set" in done.stderr


@pytest.mark.parametrize("words", [["demo", "--exit"], ["bench", "stream"]])
def test_what_has_services_of_its_own_never_runs_on_a_plants(words, tmp_path):
    (tmp_path / "dpdl.yaml").write_text("s3: {endpoint: '127.0.0.1:9'}\n")
    done = dpdl(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert "dpdl.yaml leads to others" in done.stderr


def test_a_refresh_says_what_it_has_set_aside_and_where_it_is_listed(monkeypatch):
    def refreshed(*_):
        return RefreshReport("held", "v1", "v2", "chance", 1.0, set_aside=3)

    monkeypatch.setattr(refresh, "refresh_once", refreshed)
    done = CliRunner().invoke(cli.app, ["refresh", "--once"])
    assert done.exit_code == 0, done.output
    assert "3 new images look like defects" in done.output
    listed = "s3://dpdl-models/default/versions/v2/set_aside.json lists them"
    assert listed in " ".join(done.output.split())
