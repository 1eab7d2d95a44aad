"""Cluster files pass Ray's own validators, agree with the versions of this package, and close the holes that defaults leave."""

import copy
import json
import re
import subprocess
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
AWS_FILES = [ROOT / "ray_cluster.yaml", CLUSTERS / "aws_cpu.yaml"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
Config = dict[str, Any]


def pinned(package: str) -> str:
    """The version that constraints.txt pins."""
    (found,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return found


def python_version() -> str:
    """The Python that clusters run: the lowest that the package supports."""
    return PROJECT["requires-python"].removeprefix(">=")


def ray_tag() -> str:
    return f"{pinned('ray')}-py{python_version().replace('.', '')}"


def commands_of(config: Config) -> list[str]:
    kinds = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    return [line for kind in (*kinds, "head_start_ray_commands", "worker_start_ray_commands") for line in config[kind]]


def check_with_ray(config: Config) -> Config:
    """Ray's own check; returns the configuration with the launcher's defaults filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def check_versions(config: Config) -> None:
    assert config["docker"]["image"] == f"rayproject/ray:{ray_tag()}"
    (install,) = [line for line in config["setup_commands"] if "pip install" in line]
    assert "--constraint ~/heliostat/constraints.txt" in install
    extras = re.search(r"heliostat\[([\w,]+)\]", install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


def check_sources_are_there(config: Config) -> None:
    mounted = {Path(local) for local in config["file_mounts"].values() if local.startswith("./")}
    needed = {"platform", "pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
    assert {path.as_posix() for path in mounted} == needed


def check_workers_are_bounded(config: Config) -> None:
    types = config["available_node_types"]
    workers = {name: node for name, node in types.items() if name != config["head_node_type"]}
    assert sum(node["min_workers"] for node in workers.values()) == 0, "an idle cluster must shrink to its head"
    assert all(0 < node["max_workers"] <= config["max_workers"] for node in workers.values())
    assert config["max_workers"] <= sum(node["max_workers"] for node in workers.values())
    assert all(node["resources"] == {} for node in types.values())
    assert 0 < config["idle_timeout_minutes"] <= 30


def check_doors_are_shut(config: Config) -> None:
    """`config` is the filled one: what the file leaves out, the launcher's defaults decide."""
    text = yaml.safe_dump(config)
    assert "0.0.0.0" not in text
    assert config["provider"]["cache_stopped_nodes"] is False
    for name, node in config["available_node_types"].items():
        settings = node["node_config"]
        assert settings["SecurityGroupIds"], f"{name}: the launcher would make a group that admits SSH from everywhere"
        role = "heliostat-head" if name == config["head_node_type"] else "heliostat-worker"
        assert settings["IamInstanceProfile"] == {"Name": role}, f"{name}: the launcher would attach full access to EC2 and S3"
        assert settings["MetadataOptions"]["HttpTokens"] == "required"
        assert settings["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert all(disk["Ebs"]["Encrypted"] for disk in settings["BlockDeviceMappings"])
    starts = [line for line in commands_of(config) if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def check_aws(config: Config) -> None:
    filled = check_with_ray(config)
    check_versions(config)
    check_sources_are_there(config)
    check_workers_are_bounded(filled)
    check_doors_are_shut(filled)


@pytest.fixture
def full() -> Config:
    return yaml.safe_load(AWS_FILES[0].read_text())


@pytest.mark.parametrize("path", AWS_FILES, ids=lambda path: path.name)
def test_an_aws_file_passes_rays_check_and_ours(path: Path) -> None:
    check_aws(yaml.safe_load(path.read_text()))


def test_the_cpu_file_is_the_full_one_without_gpu_workers(full: Config) -> None:
    cpu = yaml.safe_load(AWS_FILES[1].read_text())
    types = full["available_node_types"]
    full |= {"cluster_name": "heliostat-cpu", "max_workers": types["cpu"]["max_workers"]}
    full["available_node_types"] = {name: node for name, node in types.items() if not name.startswith("gpu")}
    assert cpu == full


def test_the_full_file_offers_a100_and_h100_nodes(full: Config) -> None:
    kinds = {node["node_config"]["InstanceType"] for node in full["available_node_types"].values()}
    assert {"p4d.24xlarge", "p5.48xlarge"} <= kinds


Break = Callable[[Config], object]
BROKEN: dict[str, tuple[Break, type[Exception]]] = {
    "an unknown key": (lambda c: c.update(max_worker=3), jsonschema.ValidationError),
    "a head type that does not exist": (lambda c: c.update(head_node_type="haed"), ValueError),
    "more wanted workers than allowed": (lambda c: c["available_node_types"]["cpu"].update(min_workers=99), ValueError),
    "a worker that never goes": (lambda c: c["available_node_types"]["gpu_h100"].update(min_workers=1), AssertionError),
    "resources left out": (lambda c: c["available_node_types"]["cpu"].pop("resources"), jsonschema.ValidationError),
    "another Ray": (lambda c: c["docker"].update(image="rayproject/ray:2.59.0-py311"), AssertionError),
    "another Python": (lambda c: c["docker"].update(image=f"rayproject/ray:{pinned('ray')}-py312"), AssertionError),
    "no pins": (lambda c: c.update(setup_commands=["python -m pip install heliostat"]), AssertionError),
    "an extra that does not exist": (
        lambda c: c.update(setup_commands=[line.replace("[export]", "[exports]") for line in c["setup_commands"]]),
        AssertionError,
    ),
    "the launcher's own start commands": (lambda c: c.pop("head_start_ray_commands"), AssertionError),
    "a dashboard for everybody": (
        lambda c: c.update(head_start_ray_commands=["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]),
        AssertionError,
    ),
    "workers without the token": (lambda c: c.update(worker_start_ray_commands=["ray start --address=head"]), AssertionError),
    "the launcher's own security group": (
        lambda c: c["available_node_types"]["gpu_a100"]["node_config"].update(SecurityGroupIds=[]),
        AssertionError,
    ),
    "the launcher's own role": (
        lambda c: c["available_node_types"]["head"]["node_config"].update(IamInstanceProfile={"Name": "ray-autoscaler-v1"}),
        AssertionError,
    ),
    "metadata without a session": (
        lambda c: c["available_node_types"]["cpu"]["node_config"].update(MetadataOptions={"HttpTokens": "optional"}),
        AssertionError,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_aws_file_is_caught(name: str, full: Config) -> None:
    damage, error = BROKEN[name]
    damage(full := copy.deepcopy(full))
    with pytest.raises(error):
        check_aws(full)


# -- Kubernetes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray_cluster() -> Config:
    documents = yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text())
    (found,) = [document for document in documents if document["kind"] == "RayCluster"]
    return json.loads(json.dumps(found))  # aliases become copies, as the API server sees them


def check_kuberay(cluster: Config) -> Config:
    """Returns the configuration that Ray's autoscaler derives."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        check_pod(group["template"]["spec"])
    derived = _derive_autoscaling_config_from_ray_cr(cluster)
    workers = {name: node for name, node in derived["available_node_types"].items() if name != derived["head_node_type"]}
    assert sum(node["min_workers"] for node in workers.values()) == 0
    assert all(group["replicas"] == group["minReplicas"] for group in spec["workerGroupSpecs"])
    return derived


def check_pod(pod: Config) -> None:
    (container,) = pod["containers"]
    assert container["image"].endswith(f"/heliostat:{PROJECT['version']}-ray{ray_tag()}")
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["readinessProbe"]["httpGet"] == container["livenessProbe"]["httpGet"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_kubernetes_file_gives_ray_the_nodes_that_it_says(ray_cluster: Config) -> None:
    derived = check_kuberay(ray_cluster)
    types = derived["available_node_types"]
    assert {name: node["resources"].get("GPU", 0) for name, node in types.items()} == {"headgroup": 0, "cpu": 0, "gpu": 8}
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert derived["max_workers"] == 18
    assert derived["idle_timeout_minutes"] == 10


def test_the_service_account_of_every_pod_is_in_the_file(ray_cluster: Config) -> None:
    documents = list(yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text()))
    accounts = {document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"}
    spec = ray_cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] in accounts
    assert all(group["template"]["spec"]["automountServiceAccountToken"] is False for group in spec["workerGroupSpecs"])


KUBERAY_BROKEN: dict[str, Break] = {
    "another Ray": lambda spec: spec.update(rayVersion="2.59.0"),
    "no token": lambda spec: spec.pop("authOptions"),
    "the old autoscaler": lambda spec: spec["autoscalerOptions"].update(version="v1"),
    "a root user": lambda spec: spec["workerGroupSpecs"][1]["template"]["spec"]["securityContext"].update(runAsUser=0),
    "another image": lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(image="ray:latest"),
    "a public head": lambda spec: spec["headGroupSpec"].update(serviceType="LoadBalancer"),
    "no CPU count": lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("resources"),
    "a group without a limit": lambda spec: spec["workerGroupSpecs"][1].pop("maxReplicas"),
}


@pytest.mark.parametrize("name", KUBERAY_BROKEN)
def test_a_broken_kubernetes_file_is_caught(name: str, ray_cluster: Config) -> None:
    KUBERAY_BROKEN[name](ray_cluster["spec"])
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_kuberay(ray_cluster)


# -- One machine, and what all of them share ------------------------------------------------------------------------------


def test_the_local_script_is_valid_bash_and_starts_with_a_token_on_loopback() -> None:
    script = CLUSTERS / "local.sh"
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    text = script.read_text()
    assert script.stat().st_mode & 0o111
    assert "export RAY_AUTH_MODE=token" in text
    assert "exec ray start --head --block --dashboard-host=127.0.0.1" in text
    broken = subprocess.run(["bash", "-n"], input=text.replace("fi\n", "\n"), capture_output=True, text=True, timeout=10)
    assert broken.returncode != 0


def test_the_versions_of_this_environment_are_the_ones_that_clusters_run() -> None:
    assert version("ray") == pinned("ray")
    assert version("torch").partition("+")[0] == pinned("torch")
    (ray,) = [requirement for requirement in PROJECT["dependencies"] if requirement.startswith("ray[")]
    assert f">={'.'.join(pinned('ray').split('.')[:2])}," in ray


def test_no_cluster_text_opens_anything_to_every_address() -> None:
    for path in [*AWS_FILES, *CLUSTERS.iterdir()]:
        assert "0.0.0.0" not in path.read_text(), path.name


def test_the_readme_builds_the_image_that_kubernetes_runs() -> None:
    readme = (CLUSTERS / "README.md").read_text()
    assert f"FROM rayproject/ray:{ray_tag()}" in readme
    assert f"/heliostat:{PROJECT['version']}-ray{ray_tag()}" in readme


READ_ONLY_ON_EVERYTHING = {"ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages"}


def policy_problems(policy: Config) -> list[str]:
    found = []
    for statement in policy["Statement"]:
        name, actions = statement["Sid"], statement["Action"]
        found += [f"{name}: wildcard action {action}" for action in actions if "*" in action]
        if statement["Resource"] == "*" and not set(actions) <= READ_ONLY_ON_EVERYTHING:
            found.append(f"{name}: every resource")
        if "ec2:TerminateInstances" in actions and "Condition" not in statement:
            found.append(f"{name}: may terminate what is not Ray's")
    return found


def test_the_policies_in_the_readme_allow_no_more_than_they_must() -> None:
    policies = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", (CLUSTERS / "README.md").read_text(), re.DOTALL)]
    assert len(policies) == 2
    assert [problem for policy in policies for problem in policy_problems(policy)] == []
    full_access = {"Statement": [{"Sid": "All", "Effect": "Allow", "Action": ["s3:*"], "Resource": "*"}]}
    assert policy_problems(full_access) == ["All: wildcard action s3:*", "All: every resource"]
