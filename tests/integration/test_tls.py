"""TLS and mTLS on the gRPC port: who gets in, and how certificates are renewed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from federation.v1 import fleet_service_pb2, fleet_service_pb2_grpc
from federation.v1.report_pb2 import AnalyticsReport
from federation_server.app import StartError
from federation_server.domain.authority import Issued
from federation_server.live import certificates
from tests.support.federation import BareNeuron, Federation, connected, running
from tests.support.pki import Pki, serial, shown_serial
from tests.support.waiting import eventually
from tests.unit.test_certificates import unheard_of_curve

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


@pytest.fixture
def other(tmp_path: Path) -> Pki:
    """Somebody else's CA."""
    return Pki(tmp_path / "other")


@pytest_asyncio.fixture
async def federation(database_url: str, pki: Pki) -> AsyncIterator[Federation]:
    async with running(database_url, tls=pki.credentials(), **pki.settings()) as federation:
        yield federation


@pytest_asyncio.fixture
async def mutual(database_url: str, pki: Pki) -> AsyncIterator[Federation]:
    """A federation that asks for a client's certificate."""
    credentials = pki.credentials(pki.client())
    async with running(database_url, tls=credentials, **pki.settings(mtls=True)) as federation:
        yield federation


async def answers(
    federation: Federation, credentials: grpc.ChannelCredentials | None, *, key: bool = True
) -> tuple[grpc.StatusCode, str]:
    """How an admin's call ends on a connection of its own: its code and details."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        opened = grpc.aio.insecure_channel(federation.address, options)
    else:
        opened = grpc.aio.secure_channel(federation.address, credentials, options)
    async with opened as channel:
        fleet: fleet_service_pb2_grpc.FleetServiceAsyncStub
        fleet = fleet_service_pb2_grpc.FleetServiceStub(channel)
        try:
            await fleet.GetFleetOverview(
                fleet_service_pb2.GetFleetOverviewRequest(),
                metadata=federation.admin if key else (),
                timeout=10,
            )
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
    return OK, ""


async def serial_shown(federation: Federation) -> int:
    return await asyncio.to_thread(shown_serial, federation.address)


async def is_alive(neuron: BareNeuron) -> bool:
    """Whether the stream takes a message and answers it."""
    neuron.sequence += 1
    await neuron.send(sequence=neuron.sequence, analytics_report=AnalyticsReport())
    await neuron.acked(neuron.sequence)
    return True


async def test_a_client_that_trusts_the_ca_gets_in_and_others_do_not(
    federation: Federation, pki: Pki, other: Pki
) -> None:
    assert await answers(federation, pki.credentials()) == (OK, "")
    code, details = await answers(federation, other.credentials())
    assert code is UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details
    assert (await answers(federation, None))[0] is UNAVAILABLE


async def test_a_client_needs_a_certificate_of_the_clients_ca_and_made_for_clients(
    mutual: Federation, pki: Pki, other: Pki
) -> None:
    assert await answers(mutual, pki.credentials(pki.client())) == (OK, "")
    assert (await answers(mutual, pki.credentials()))[0] is UNAVAILABLE
    assert (await answers(mutual, pki.credentials(other.client())))[0] is UNAVAILABLE
    servers_own = pki.credentials((pki.certificate, pki.key))
    assert (await answers(mutual, servers_own))[0] is UNAVAILABLE
    assert (await answers(mutual, None))[0] is UNAVAILABLE


async def test_a_clients_certificate_is_no_substitute_for_its_key(
    mutual: Federation, pki: Pki
) -> None:
    code, _ = await answers(mutual, pki.credentials(pki.client("admin")), key=False)
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_new_connections_get_a_renewed_certificate_and_an_open_stream_goes_on(
    federation: Federation, pki: Pki
) -> None:
    async with connected(federation, "n-1") as neuron:
        before = await serial_shown(federation)
        renewed = pki.renew()
        assert renewed != before
        assert await serial_shown(federation) == renewed
        assert await answers(federation, pki.credentials()) == (OK, "")
        assert await is_alive(neuron)


async def test_a_server_goes_on_over_a_renewal_by_another_ca(
    federation: Federation, pki: Pki, other: Pki
) -> None:
    async with connected(federation, "n-1") as neuron:
        pki.renew(other.server())
        assert await answers(federation, other.credentials()) == (OK, "")
        assert (await answers(federation, pki.credentials()))[0] is UNAVAILABLE
        assert await is_alive(neuron)


async def test_a_renewed_clients_ca_decides_who_gets_in_from_then_on(
    mutual: Federation, pki: Pki, other: Pki
) -> None:
    theirs = pki.credentials(other.client())
    assert (await answers(mutual, theirs))[0] is UNAVAILABLE
    pki.write("ca.crt", other.ca.read_bytes())
    assert await answers(mutual, theirs) == (OK, "")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda pki: pki.key.unlink(),
        lambda pki: pki.write("server.key", pki.server().key),
        lambda pki: pki.certificate.write_bytes(pki.certificate.read_bytes()[:100]),
    ],
    ids=["missing", "mismatched", "cut off"],
)
async def test_a_broken_renewal_keeps_the_old_certificate_and_is_logged_once(
    federation: Federation,
    pki: Pki,
    break_it: Callable[[Pki], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certificates, "SETTLES_WITHIN", certificates.SETTLES_WITHIN * 0)
    before = await serial_shown(federation)
    with capture_logs() as logs:
        break_it(pki)
        for _ in range(3):
            assert await serial_shown(federation) == before
    assert await answers(federation, pki.credentials()) == (OK, "")
    failures = [line for line in logs if line["action"] == "certificate_renewal_failed"]
    assert len(failures) == 1
    renewed = pki.renew()
    assert await serial_shown(federation) == renewed


async def test_a_broken_renewal_is_said_also_while_nobody_connects(
    database_url: str, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "LOOK_INTERVAL_S", 0.01)
    monkeypatch.setattr(certificates, "SETTLES_WITHIN", certificates.SETTLES_WITHIN * 0.01)
    with capture_logs() as logs:

        def said() -> bool:
            return "certificate_renewal_failed" in {line["action"] for line in logs}

        async with running(database_url, tls=pki.credentials(), **pki.settings()):
            pki.key.unlink()
            await eventually(said, describe="the error in the log")


async def test_a_server_outlives_a_renewal_by_a_key_that_nobody_has_heard_of(
    federation: Federation, pki: Pki
) -> None:
    before = await serial_shown(federation)
    unheard_of_curve(pki)
    certificates = federation.app.certificates
    assert certificates is not None
    await asyncio.to_thread(certificates.renewed, thorough=True)  # as `run` does
    assert await serial_shown(federation) == before
    assert await answers(federation, pki.credentials()) == (OK, "")


async def test_grpc_reads_whatever_file_was_found_to_be_whole(
    federation: Federation, pki: Pki
) -> None:
    issued = pki.server()
    mark = b"\xef\xbb\xbf"  # which BoringSSL's reader stumbles over
    pki.renew(Issued(mark + issued.certificate, mark + issued.key, issued.expire_time))
    assert await serial_shown(federation) == serial(issued.certificate)


async def test_a_server_does_not_start_with_an_expired_certificate(
    database_url: str, pki: Pki
) -> None:
    pki.renew(pki.server(since=timedelta(days=2)))
    with pytest.raises(StartError, match=r"FEDERATION_TLS_CERT_FILE: .* expired on"):
        async with running(database_url, **pki.settings()):
            pass


async def test_plaintext_is_not_served_beyond_this_machine(database_url: str, pki: Pki) -> None:
    with pytest.raises(StartError, match="`federation tls init` makes both"):
        async with running(database_url, host="0.0.0.0"):
            pass
    async with running(database_url, tls=pki.credentials(), host="0.0.0.0", **pki.settings()) as f:
        assert await answers(f, pki.credentials()) == (OK, "")
