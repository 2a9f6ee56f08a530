"""What is deployed, without deploying it: bounds, the lag policy, the config file, no secrets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import SecretStr, ValidationError
from ray._common.utils import import_attr
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

import serving.app
from infra.errors import SettingsError
from infra.settings import load_settings
from serving.app import AppArgs, application, consumer_bounds
from serving.scaling import LagPolicy

CONFIG = Path(serving.app.__file__).with_name("serve_config.yaml")


def settings_of(**environ):
    return load_settings({"DPDL_STATE_DIR": "/nowhere/dpdl", **environ})


@pytest.mark.parametrize(
    ("lag", "wanted"),
    [({}, 2), ({"a": 0}, 1), ({"a": 500}, 1), ({"a": 501}, 2), ({"a": 900, "b": 700}, 4)],
)
def test_consumers_for_a_lag(lag, wanted):
    """500 frames a consumer; with no report at all the target stays."""
    context = SimpleNamespace(
        aggregated_metrics={"lag_frames": lag} if lag else None, target_num_replicas=2
    )
    assert LagPolicy(lag_per_consumer=500)(context) == (wanted, {})


@pytest.mark.parametrize(
    ("low", "high", "cpus", "bounds"),
    [
        (1, 0, 2, (1, 1)),
        (1, 0, 16, (1, 2)),
        (1, 0, 640, (1, 4)),
        (1, 3, 2, (1, 3)),
        (2, 8, 2, (2, 4)),
        (3, 0, 2, (3, 3)),
        (9, 9, 2, (4, 4)),
    ],
)
def test_consumers_are_never_more_than_partitions(low, high, cpus, bounds):
    settings = settings_of(DPDL_SERVE_MIN_CONSUMERS=str(low), DPDL_SERVE_MAX_CONSUMERS=str(high))
    assert consumer_bounds(settings, cpus, num_partitions=4) == bounds


def test_consumers_are_as_many_as_the_topic_has_partitions():
    """It may be older than the settings, and have been widened since."""
    settings = settings_of(DPDL_SERVE_MAX_CONSUMERS="16")
    parts = deployments(application(AppArgs(), settings, [{"CPU": 2}], num_partitions=12))
    assert parts["Consumer"]._deployment_config.autoscaling_config.max_replicas == 12
    assert consumer_bounds(settings, 2, num_partitions=3) == (1, 3)


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(SettingsError, match=r"min_consumers=3 is more than serve\.max_consumers=2"):
        settings_of(DPDL_SERVE_MIN_CONSUMERS="3", DPDL_SERVE_MAX_CONSUMERS="2")


def deployments(app):
    """Deployment name -> its Deployment, of an application and all that is bound into it."""
    found, todo = {}, [app]
    while todo:
        deployment = todo.pop()._bound_deployment
        found[deployment.name] = deployment
        todo += [arg for arg in deployment.init_args if hasattr(arg, "_bound_deployment")]
    return found


def test_replicas_follow_lag_and_queue_where_the_settings_allow():
    settings = settings_of(DPDL_SERVE_MAX_CONSUMERS="3", DPDL_SERVE_MAX_SCORERS="2")
    parts = deployments(application(AppArgs(), settings, [{"CPU": 2}], 4))
    lag = parts["Consumer"]._deployment_config.autoscaling_config
    assert (lag.min_replicas, lag.max_replicas) == (1, 3)
    policy = lag.policy.get_policy()
    assert policy.__name__ == "LagPolicy"
    assert lag.policy.policy_kwargs == {"lag_per_consumer": 500}
    queue = parts["Scorer"]._deployment_config.autoscaling_config
    assert (queue.min_replicas, queue.max_replicas) == (1, 2)
    assert queue.target_ongoing_requests == settings.stream.max_in_flight
    plain = deployments(application(AppArgs(), settings_of(), [{"CPU": 2}], 4))
    assert plain["Consumer"]._deployment_config.autoscaling_config is None
    assert plain["Consumer"].num_replicas == 1


HEAD, SMALL, GPU_MACHINE = {"memory": 4e9}, {"CPU": 2}, {"CPU": 8, "GPU": 1}


@pytest.mark.parametrize(
    ("nodes", "device", "cpus", "gpus"),
    [
        ([SMALL], "", 0, 0),  # beside training on two cores
        ([SMALL], "cuda", 0, 0.25),
        ([GPU_MACHINE], "", 1, 0.25),
        ([GPU_MACHINE], "cpu", 1, 0),
        ([HEAD], "", 1, 0),  # its machines are still to come
        ([HEAD], "cuda", 1, 0.25),
        ([HEAD, SMALL], "", 1, 0),
    ],
)
def test_no_replica_is_placed_on_a_head_that_has_no_cpus(nodes, device, cpus, gpus):
    parts = deployments(application(AppArgs(device=device), settings_of(), nodes, 4))
    reserved = {name: part.ray_actor_options["num_cpus"] for name, part in parts.items()}
    assert reserved == {"Consumer": cpus, "Scorer": cpus, "Console": cpus / 2}
    assert parts["Scorer"].ray_actor_options["num_gpus"] == gpus


def test_the_config_file_is_what_ray_serve_takes(monkeypatch):
    """Built as `serve deploy` does, up to the services."""
    monkeypatch.setenv("DPDL_STATE_DIR", "/nowhere/dpdl")
    prepared = []

    def prepare(_, model_name):
        prepared.append(model_name)
        return 4

    monkeypatch.setattr(serving.app, "_prepare", prepare)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (app,) = schema.applications
    built = call_user_app_builder_with_args_if_necessary(import_attr(app.import_path), app.args)
    assert set(deployments(built)) == {"Consumer", "Scorer", "Console"}
    assert prepared == ["default"]
    with pytest.raises(ValidationError, match="extra"):
        serving.app.build({**app.args, "modle_name": "x"})


def test_no_secret_travels_with_the_deployments():
    """The dashboard shows runtime environments, arguments and options of every actor."""
    settings = settings_of()
    secret = "s3cret-of-the-plant"
    for group, field in (
        ("kafka", "sasl_password"),
        ("redis", "password"),
        ("s3", "secret_key"),
        ("serve", "token"),
    ):
        part = getattr(settings, group).model_copy(update={field: SecretStr(secret)})
        settings = settings.model_copy(update={group: part})
    parts = deployments(application(AppArgs(), settings, [{"CPU": 16, "GPU": 1}], 4))
    assert set(parts) == {"Console", "Consumer", "Scorer"}
    for name, part in parts.items():
        variables = part.ray_actor_options["runtime_env"]["env_vars"]
        own = {"Scorer": {"MALLOC_ARENA_MAX": "1"}, "Console": {"DEPLOYED_BY": ""}}
        assert variables == {"DPDL_STATE_DIR": str(settings.state_dir)} | own.get(name, {})
        shown = [part._deployment_config.to_proto_bytes(), str(part.init_args).encode()]
        assert not any(secret.encode() in each for each in shown)
        assert secret not in str(part.ray_actor_options)


def test_a_consumer_is_spared_torch():
    """Its replicas are many, and PyTorch is most of what a process with it takes."""
    heavy = "{'torch', 'torchvision', 'timm', 'scipy', 'sklearn'} & set(sys.modules)"
    code = f"import sys, serving.consume; print({heavy} or '')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
