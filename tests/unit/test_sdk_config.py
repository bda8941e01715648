"""Settings: code first, then the environment, then defaults; a bad value names its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from neuron_sdk import ConfigError, Neuron, NeuronConfig
from neuron_sdk.config import resolve
from neuron_sdk.description import AlertThresholds, ApiEndpoint, Deployment
from neuron_sdk.tls import TlsFiles
from tests.support.pki import Pki

ID = {"NEURON_ID": "n-1", "NEURON_TYPE": "worker", "XDG_STATE_HOME": "/state"}


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_the_environment_fills_what_code_leaves_out() -> None:
    environment = {
        "FEDERATION_URL": "grpc://fed.example:6000",
        "NEURON_ID": "from-environment",
        "NEURON_NAME": "A name",
        "NEURON_TYPE": "worker",
        "ENROLLMENT_TOKEN": "fet_x",
        "HEARTBEAT_INTERVAL": "15",
        "ANALYTICS_INTERVAL": "30.5",
        "LOG_LEVEL": "debug",
        "LOG_FILE": "/var/log/n.log",
        "METRICS_ENABLED": "false",
        "METRICS_PORT": "9000",
        "STATE_DIR": "/var/lib/n",
    }
    settings = resolve(NeuronConfig(neuron_id="from-code"), environment)
    assert settings.neuron_id == "from-code"
    assert settings.name == "A name"
    assert settings.target == "fed.example:6000"
    assert settings.enrollment_token == "fet_x"
    assert (settings.heartbeat_interval, settings.analytics_interval) == (15.0, 30.5)
    assert settings.log_level == "DEBUG"
    assert settings.log_file == Path("/var/log/n.log")
    assert settings.metrics_enabled is False
    assert settings.metrics_port == 9000
    assert settings.state_dir == Path("/var/lib/n")


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = resolve(NeuronConfig(), ID)
    assert settings.name == "n-1"
    assert settings.target == "localhost:50051"
    assert (settings.heartbeat_interval, settings.analytics_interval) == (60.0, 300.0)
    assert settings.metrics_enabled
    assert settings.metrics_port == 8080
    assert settings.stop_grace == 10.0
    assert settings.state_dir == Path("/state/neuron/n-1")


def test_state_goes_to_the_home_folder_without_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = resolve(NeuronConfig(), {"NEURON_ID": "n-1", "NEURON_TYPE": "worker"})
    assert settings.state_dir == Path("/home/somebody/.local/state/neuron/n-1")


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert resolve(NeuronConfig(), {**ID, "METRICS_PORT": "", "LOG_FILE": " "}).log_file is None


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("localhost:50051", "localhost:50051"),
        ("grpc://10.0.0.1:1", "10.0.0.1:1"),
        ("grpc://host:1/", "host:1"),
        ("localhost", "localhost:50051"),
        ("127.0.0.2:1", "127.0.0.2:1"),
        ("[::1]:50051", "[::1]:50051"),
        ("grpc://[::1]", "[::1]:50051"),
    ],
)
def test_plaintext_is_said_by_a_scheme_or_is_for_loopback(url: str, target: str) -> None:
    settings = resolve(NeuronConfig(), {**ID, "FEDERATION_URL": url})
    assert settings.target == target
    assert settings.tls is None


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("federations://fed.example:443", "fed.example:443"),
        ("grpcs://fed.example/", "fed.example:50051"),
        ("federations://localhost", "localhost:50051"),
        ("fed.example", "fed.example:50051"),
        ("fed:1", "fed:1"),
        ("10.0.0.1", "10.0.0.1:50051"),
        ("[2001:db8::1]:1", "[2001:db8::1]:1"),
    ],
)
def test_a_scheme_with_an_s_is_tls_and_so_is_none_beyond_loopback(url: str, target: str) -> None:
    settings = resolve(NeuronConfig(), {**ID, "FEDERATION_URL": url})
    assert settings.target == target
    assert settings.tls == TlsFiles()


def test_loopback_without_a_scheme_is_tls_where_a_ca_is_named(pki: Pki) -> None:
    environment = {**ID, **pki.client_environment(pki.client())}
    for url, tls in [("", True), ("fed:1", True), ("grpc://fed:1", False), ("grpcs://fed", True)]:
        settings = resolve(NeuronConfig(), {**environment, "FEDERATION_URL": url})
        assert (settings.tls is not None) is tls, url


@pytest.mark.parametrize(
    ("variable", "file", "words"),
    [
        ("FEDERATION_CA_FILE", "nowhere", "cannot be read"),
        ("FEDERATION_CA_FILE", "client-n.key", "no certificate in PEM format"),
        ("FEDERATION_CLIENT_CERT_FILE", "nowhere", "cannot be read"),
        ("FEDERATION_CLIENT_CERT_FILE", "server.crt", "its own key"),
        ("FEDERATION_CLIENT_KEY_FILE", "", "set both or none"),
        ("FEDERATION_CLIENT_CERT_FILE", "", "set both or none"),
    ],
)
def test_a_file_for_tls_that_cannot_be_used_is_named(
    pki: Pki, variable: str, file: str, words: str
) -> None:
    environment = {**ID, **pki.client_environment(pki.client())}
    resolve(NeuronConfig(), environment)
    environment[variable] = str(pki.ca.parent / file) if file else ""
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(NeuronConfig(), environment)
    assert str(caught.value).startswith(variable)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_passphrase(pki: Pki) -> None:
    certificate, key = pki.client()
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    pki.write(key.name, locked)
    with pytest.raises(ConfigError, match="without a passphrase"):
        resolve(NeuronConfig(), {**ID, **pki.client_environment((certificate, key))})


def test_a_file_that_is_away_for_a_moment_is_as_it_was(pki: Pki) -> None:
    settings = resolve(NeuronConfig(), {**ID, **pki.client_environment()})
    assert settings.tls is not None
    before = settings.tls.read()
    content = pki.ca.read_bytes()
    pki.ca.unlink()
    assert settings.tls.read() == before == (content, None, None)
    renewed = Pki(pki.ca.parent / "other").ca.read_bytes()
    pki.write("ca.crt", renewed)
    assert settings.tls.read() == (renewed, None, None)


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_a_file_of_cas_that_is_emptied_does_not_mean_that_the_public_ones_are_trusted(
    pki: Pki, content: bytes
) -> None:
    settings = resolve(NeuronConfig(), {**ID, **pki.client_environment()})
    assert settings.tls is not None
    trusted = pki.ca.read_bytes()
    pki.ca.write_bytes(content)
    assert settings.tls.read() == (trusted, None, None)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("FEDERATION_URL", "http://x:1", "grpc://host:port"),
        ("FEDERATION_URL", "https://x:1", "federations://host:port"),
        ("FEDERATION_URL", "host:0", "grpc://host:port"),
        ("FEDERATION_URL", "host:99999", "grpc://host:port"),
        ("FEDERATION_URL", "a:b:c", "grpc://host:port"),
        ("FEDERATION_URL", "user@host:1", "grpc://host:port"),
        ("NEURON_ID", "Not Valid", "lower-case"),
        ("NEURON_ID", "x" * 129, "1 to 128"),
        ("NEURON_TYPE", "Ünknown", "lower-case"),
        ("NEURON_NAME", "x" * 257, "256"),
        ("HEARTBEAT_INTERVAL", "soon", "from 1 to 86400"),
        ("HEARTBEAT_INTERVAL", "0", "from 1 to 86400"),
        ("HEARTBEAT_INTERVAL", "nan", "from 1 to 86400"),
        ("ANALYTICS_INTERVAL", "-5", "from 1 to 86400"),
        ("LOG_LEVEL", "LOUD", "DEBUG"),
        ("METRICS_ENABLED", "perhaps", "true or false"),
        ("METRICS_PORT", "65536", "from 0 to 65535"),
        ("METRICS_PORT", "80.5", "whole number"),
        ("STOP_GRACE", "inf", "from 0"),
        ("SPOOL_MAX_BYTES", "10", "from"),
    ],
)
def test_a_bad_value_names_its_variable_and_the_remedy(
    variable: str, value: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(NeuronConfig(), {**ID, variable: value})
    assert str(caught.value).startswith(variable)
    assert remedy in str(caught.value)


def test_a_bad_token_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(NeuronConfig(), {**ID, "ENROLLMENT_TOKEN": "fet_sécret"})
    assert "ENROLLMENT_TOKEN" in str(caught.value)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize("missing", ["NEURON_ID", "NEURON_TYPE"])
def test_what_has_no_default_must_be_said(missing: str) -> None:
    environment = {key: value for key, value in ID.items() if key != missing}
    with pytest.raises(ConfigError, match=f"{missing} is not set"):
        resolve(NeuronConfig(), environment)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"neuron_id": "Bad Id"}, "neuron_id"),
        ({"type": "Bad Type"}, "type"),
        ({"capabilities": "one"}, "capabilities"),
        ({"capabilities": ["a", "a"]}, "capabilities"),
        ({"dependencies": [""]}, "dependencies"),
        ({"labels": {"Bad Key": "x"}}, "labels"),
        ({"labels": {"zone": 5}}, "labels"),
        ({"metadata": {"x": float("nan")}}, "metadata"),
        ({"metadata": {"x": "y" * 70_000}}, "metadata"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"api_endpoints": [ApiEndpoint("data")]}, "api_endpoints"),
        ({"api_endpoints": [ApiEndpoint("/data", "post")]}, "api_endpoints"),
        ({"deployment": Deployment(ports=(0,))}, "deployment.ports"),
        ({"alert_thresholds": AlertThresholds(cpu_percent=101)}, "alert_thresholds.cpu_percent"),
        ({"alert_thresholds": AlertThresholds(heartbeat_timeout=0.5)}, "heartbeat_timeout"),
        ({"max_concurrent_commands": 0}, "max_concurrent_commands"),
        ({"version": "a\0b"}, "version"),
    ],
)
def test_a_bad_argument_is_named_when_the_neuron_is_built(
    arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Neuron(**{"neuron_id": "n-1", "type": "worker"} | arguments)


def test_a_neuron_that_speaks_seldom_asks_for_patience() -> None:
    neuron = Neuron("n-1", type="worker", config=NeuronConfig(heartbeat_interval=300))
    thresholds = neuron.describe(neuron.settings()).alert_thresholds
    assert thresholds is not None
    assert thresholds.heartbeat_timeout == 600
    usual = Neuron("n-1", type="worker", config=NeuronConfig(heartbeat_interval=60))
    assert usual.describe(usual.settings()).alert_thresholds is None


def test_checked_dependencies_are_part_of_the_description() -> None:
    neuron = Neuron("n-1", type="worker", dependencies=["redis", "s3"])
    neuron.dependency("redis")(lambda: True)
    neuron.dependency("postgresql")(lambda: True)
    assert neuron.describe(neuron.settings()).dependencies == ("redis", "s3", "postgresql")


def test_a_bad_dependency_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="interval"):
        Neuron("n-1", type="worker").dependency("redis", interval=-1)(lambda: True)


def test_a_variable_that_the_code_overrules_is_named() -> None:
    config = NeuronConfig(neuron_id="in-code", metrics_port=9000)
    environment = {**ID, "NEURON_ID": "said-aloud", "METRICS_PORT": "9000", "ENROLLMENT_TOKEN": "t"}
    settings = resolve(config, environment)
    assert settings.neuron_id == "in-code"
    assert settings.overruled == ("NEURON_ID",)
