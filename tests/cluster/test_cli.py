"""The command line: reports, key=value pairs, exit codes. No services, no network."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from cluster import cli, demo
from cluster.commands.shared import (
    check_device,
    device_here,
    duration,
    key_values,
    write_report,
)
from infra.errors import DpdlError
from pipelines import datasets, refresh
from pipelines.datasets import ImportReport
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


def test_without_a_name_a_gpu_is_taken_where_there_is_one_and_said(monkeypatch, capsys):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_here("") == device
        assert f"device: {device}" in capsys.readouterr().err
    assert device_here("cpu") == "cpu"
    with pytest.raises(ValueError, match="--device foo"):
        device_here("foo")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_an_import_is_no_traceback(monkeypatch, capsys, number):
    """NumPy's C code answers the interrupt with an ImportError."""

    def importing():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except KeyboardInterrupt:
            raise ImportError("numpy._core.multiarray failed to import") from None

    monkeypatch.setattr(cli, "app", importing)
    monkeypatch.setattr(cli, "interrupted", False)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "dpdl: interrupted\n"


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


def commands_in(text):
    """What follows `dpdl` in a Markdown text's code: a line of a block, or between backticks."""
    text = re.sub(r"^```.*", "", text, flags=re.M).replace("\\\n", " ").replace("\\|", "|")
    block = re.compile(r"^ {4,}.*", re.M)
    for code in block.findall(text) + re.findall(r"`([^`]+)`", block.sub("", text)):
        for found in re.findall(r"(?<![\w./-])(?:\.venv/bin/)?dpdl ([a-z][^#&;'`]*)", code):
            yield " ".join(found.split())


def unknown(line):
    """The first word of `dpdl LINE` that is no command or option of it, "" where all are."""
    root = typer.main.get_command(cli.app)
    meant = [root]  # more than one behind "score|stream"
    for word in re.sub(r"[][,]", " ", line).replace(" | ", " ").split():
        groups = [each for each in meant if hasattr(each, "commands")]
        if word.startswith("--"):
            name = word.partition("=")[0]
            for each in meant:
                # `dpdl job train ARGS` hands on what it does not know to `dpdl train ARGS`.
                passed_on = each.context_settings.get("ignore_unknown_options")
                more = root.commands[each.name].params if passed_on else []
                if all(name not in (*p.opts, *p.secondary_opts) for p in (*each.params, *more)):
                    return word
        elif groups and word != "...":
            names = word.split("|")
            if any(name not in groups[0].commands for name in names):
                return word
            meant = [groups[0].commands[name] for name in names]
    return ""


def test_every_command_in_the_readme_and_the_docs_exists():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    found = [(page.name, line) for page in pages for line in commands_in(page.read_text())]
    assert len(found) > 80
    assert [each for each in found if unknown(each[1])] == []
    for line, wrong in (("trian", "trian"), ("models lst", "lst"), ("up --wait", "--wait")):
        assert unknown(line) == wrong


@pytest.mark.parametrize("wrong", ["yesterday", "9" * 20, f"1-{2**64}"])
def test_an_id_that_no_alert_can_have_is_named(wrong):
    done = CliRunner().invoke(cli.app, ["alerts", "--after", wrong])
    assert f"--after {wrong}: wanted the id of an alert" in str(done.exception)


def test_names_of_files_are_no_markup(monkeypatch, tmp_path):
    skipped = [{"source": "a[/b].png", "reason": "duplicate of [old] [/c].png"}]
    done = ImportReport("d", "", {}, skipped, objects=0, written=0, removed=0)
    monkeypatch.setattr(datasets, "import_dataset", lambda *_, **__: done)
    report = tmp_path / "report.json"
    command = ["data", "import", "elpv", "--name", "d", "--report", str(report)]
    said = CliRunner().invoke(cli.app, command)
    assert said.exit_code == 0, said.output
    assert "a[/b].png: duplicate of [old] [/c].png" in said.output
    assert json.loads(report.read_text())["skipped"] == skipped


def test_a_demo_that_lost_frames_has_failed():
    whole = {"frames_sent": 9, "frames_lost": 0, "frames_duplicated": 0}
    demo._check_account(whole)
    for wrong in ("frames_lost", "frames_duplicated"):
        with pytest.raises(DpdlError, match="of 9 frames"):
            demo._check_account(whole | {wrong: 1})


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
