"""A neuron of the SDK on TLS: it registers, holds its stream, comes back, and says what fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from federation_server.domain import authority
from neuron_sdk import Neuron, NeuronConfig, lifecycle
from neuron_sdk.mode import Mode
from tests.support.calls import online, shown
from tests.support.federation import Federation, running
from tests.support.pki import Pki
from tests.support.proxy import proxy
from tests.support.sdk_neuron import N, be_quick
from tests.support.waiting import eventually

_quick = pytest.fixture(autouse=True)(be_quick)


class Place:
    """A database, a CA and another one, and what is started with them."""

    def __init__(self, database_url: str, folder: Path) -> None:
        self.database_url = database_url
        self.pki, self.other = Pki(folder / "pki"), Pki(folder / "other")
        self.client = self.pki.client()
        self._folder = folder

    @asynccontextmanager
    async def federation(self, *, mtls: bool = False) -> AsyncIterator[Federation]:
        credentials = self.pki.credentials(self.client if mtls else None)
        settings = self.pki.settings(mtls=mtls)
        async with running(self.database_url, tls=credentials, **settings) as federation:
            # Its channel is connected before a test makes the server's certificate another one.
            await federation.channel.channel_ready()
            yield federation

    def unstarted(self, **settings: Any) -> Neuron:
        config = NeuronConfig(
            state_dir=self._folder / "state",
            heartbeat_interval=1,
            metrics_enabled=False,
            stop_grace=0.2,
            **settings,
        )
        return Neuron(N, type="worker", config=config)

    @asynccontextmanager
    async def neuron(
        self,
        federation: Federation,
        *,
        scheme: str = "federations",
        address: str = "",
        **settings: Any,
    ) -> AsyncIterator[None]:
        """A neuron that was started, at the federation's address unless another is given."""
        neuron = self.unstarted(
            federation_url=f"{scheme}://{address or federation.address}",
            enrollment_token=await federation.enrollment_token(),
            **settings,
        )
        await asyncio.to_thread(neuron.start)
        try:
            yield
        finally:
            await asyncio.to_thread(neuron.stop)

    @property
    def with_certificate(self) -> dict[str, Any]:
        """The settings of a neuron that has a certificate."""
        certificate, key = self.client
        return {"ca_file": self.pki.ca, "client_cert_file": certificate, "client_key_file": key}


@pytest.fixture
def place(database_url: str, tmp_path: Path) -> Place:
    return Place(database_url, tmp_path)


async def said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """Waits until the neuron's log names that problem."""

    def problem() -> bool:
        return any(words in str(getattr(record, "problem", "")) for record in caplog.records)

    await eventually(problem, describe=f"{words!r} in the log")


async def test_a_neuron_registers_and_holds_its_stream_over_tls(place: Place) -> None:
    async with (
        place.federation() as federation,
        place.neuron(federation, ca_file=place.pki.ca),
    ):
        await online(federation, N)


async def test_a_neuron_shows_its_certificate_where_it_is_asked_for(place: Place) -> None:
    async with (
        place.federation(mtls=True) as federation,
        place.neuron(federation, **place.with_certificate),
    ):
        await online(federation, N)


async def test_a_neuron_stays_over_a_renewal_and_comes_back_with_its_own_files_renewed(
    place: Place,
) -> None:
    """Everything changes hands to another CA while the stream is open; then the stream is cut."""
    pki, other = place.pki, place.other
    async with (
        place.federation(mtls=True) as federation,
        proxy(federation.address) as through,
        place.neuron(federation, address=through.address, **place.with_certificate),
    ):
        first = await online(federation, N)
        pki.write("ca.crt", other.ca.read_bytes())
        pki.renew(other.server())
        for path, fresh in zip(place.client, other.client(), strict=True):
            pki.write(path.name, fresh.read_bytes())
        assert (await online(federation, N)).session.epoch == first.session.epoch
        through.cut()
        await online(federation, N, epoch=first.session.epoch + 1)


async def test_a_neuron_with_a_token_says_soon_that_the_certificate_is_not_trusted_any_more(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        place.federation() as federation,
        proxy(federation.address) as through,
        place.neuron(federation, address=through.address, ca_file=place.pki.ca),
    ):
        first = await online(federation, N)
        place.pki.renew(place.other.server())
        through.cut()
        await said(caplog, "from a CA that is not trusted here")
        place.pki.renew()
        await online(federation, N, epoch=first.session.epoch + 1)


async def test_a_neuron_that_runs_once_does_so_over_tls(place: Place) -> None:
    async with place.federation(mtls=True) as federation:
        neuron = place.unstarted(
            federation_url=f"grpcs://{federation.address}",
            enrollment_token=await federation.enrollment_token(),
            **place.with_certificate,
        )
        assert (await lifecycle.serve(neuron, mode=Mode.ONCE)).failure == ""
        assert (await shown(federation, N)).HasField("last_heartbeat")


Wrong = Callable[[Pki, Pki], dict[str, Any]]


def other_ca(_: Pki, other: Pki) -> dict[str, Any]:
    return {"ca_file": other.ca}


def no_ca(_: Pki, __: Pki) -> dict[str, Any]:
    return {}


def other_name(pki: Pki, _: Pki) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "LOCAL_NAMES", ())
        pki.renew(pki.server("fed.example"))
    return {"ca_file": pki.ca}


def no_tls(_: Pki, __: Pki) -> dict[str, Any]:
    return {"scheme": "federation"}


@pytest.mark.parametrize(
    ("go_wrong", "says"),
    [
        (other_ca, "from a CA that is not trusted here: set FEDERATION_CA_FILE"),
        (no_ca, "from a CA that is not trusted here: set FEDERATION_CA_FILE"),
        (other_name, "not for the name in FEDERATION_URL"),
        (no_tls, "if it speaks TLS, write federations://"),
    ],
)
async def test_a_neuron_that_does_not_get_in_says_why(
    place: Place, caplog: pytest.LogCaptureFixture, go_wrong: Wrong, says: str
) -> None:
    async with place.federation() as federation:
        wrong = go_wrong(place.pki, place.other)
        async with place.neuron(federation, **wrong):
            await said(caplog, says)


async def test_a_neuron_without_a_certificate_is_told_that_it_may_need_one(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        place.federation(mtls=True) as federation,
        place.neuron(federation, ca_file=place.pki.ca),
    ):
        await said(caplog, "it may ask for a certificate (FEDERATION_CLIENT_CERT_FILE")


async def test_a_neuron_on_tls_says_that_the_server_speaks_plaintext(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        running(place.database_url) as federation,
        place.neuron(federation, ca_file=place.pki.ca),
    ):
        await said(caplog, "the federation speaks plaintext, and FEDERATION_URL asks for")


async def test_tokens_in_plaintext_beyond_this_machine_are_warned_of_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody need answer there: what is asked for is that it is said before anything is sent."""

    def warnings() -> list[str]:
        records = [r for r in caplog.records if getattr(r, "action", "") == "session.plaintext"]
        return [record.target for record in records]  # type: ignore[attr-defined]

    for url in ("federation://192.0.2.1:1", "federations://192.0.2.1:1", "127.0.0.1:1"):
        neuron = place.unstarted(federation_url=url)
        await asyncio.to_thread(neuron.start)
        await asyncio.to_thread(neuron.stop)
    assert warnings() == ["192.0.2.1:1"]
