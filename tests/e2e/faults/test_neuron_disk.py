"""A neuron whose disk is really full, or has damaged its state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from federation.v1 import heartbeat_pb2
from tests.support.calls import answer, counted, online, shown
from tests.support.disk import SmallDisk, mountable, small_disk
from tests.support.federation import Served
from tests.support.neuron_process import NeuronProcess, neuron_process
from tests.support.waiting import eventually

SERVICE = ("-m", "tests.support.neuron_service")
BACK_WITHIN_S = 40.0  # it tries the disk every 15 s

needs_small_disk = pytest.mark.skipif(
    not mountable(), reason="a small file system cannot be mounted here: it takes Linux and root"
)


@pytest.fixture
def disk(folder: Path) -> Iterator[SmallDisk]:
    with small_disk(folder / "small", megabytes=4) as disk:
        yield disk


async def settings(served: Served, folder: Path, name: str) -> dict[str, str]:
    token = await served.enrollment_token()
    return {"NEURON_ID": name, "ENROLLMENT_TOKEN": token, "SERVICE_FOLDER": str(folder)}


async def spool(served: Served, name: str) -> heartbeat_pb2.SpoolStatus:
    return (await shown(served, name)).last_heartbeat.spool


async def said_in_memory(neuron: NeuronProcess) -> tuple[bool, bool, str]:
    """What /status and /health say of it, and the status in /health."""
    status = json.loads((await neuron.page("/status"))[1])
    code, health = await neuron.health()
    assert code == 200, "a full disk is no reason to be taken out of service"
    return status["spool"]["in_memory"], health["spool_in_memory"], health["status"]


@needs_small_disk
async def test_a_neuron_with_a_full_disk_works_on_says_so_and_is_back_on_the_disk_without_loss(
    served: Served, folder: Path, disk: SmallDisk
) -> None:
    name, state = "full-disk", disk.folder / "state"
    environment = await settings(served, folder, name)
    with neuron_process(
        folder, served.address, *SERVICE, STATE_DIR=str(state), **environment
    ) as neuron:
        await online(served, name)
        assert not (await spool(served, name)).in_memory
        disk.fill()

        async def in_memory() -> bool:
            return (await spool(served, name)).in_memory

        await eventually(in_memory, describe="the heartbeat says that the spool is in memory")
        assert (await said_in_memory(neuron))[:2] == (True, True)
        assert (await said_in_memory(neuron))[2] != "healthy"
        assert (await answer(served, name, "isolated", a=4))["twice"] == 8
        disk.free()

        async def on_disk() -> bool:
            return not (await spool(served, name)).in_memory

        await eventually(on_disk, within=BACK_WITHIN_S, describe="the spool on disk")
        assert (await said_in_memory(neuron))[:2] == (False, False)
        assert (await answer(served, name, "isolated", a=5))["twice"] == 10
        assert await neuron.stop() == 0
        (ticked,) = (folder / "ticks").read_text().split()
        assert await counted(served, name, "ticks") == int(ticked) > 0
        assert (await spool(served, name)).dropped == 0


async def test_a_neuron_whose_spool_is_damaged_sets_it_aside_and_works(
    served: Served, folder: Path
) -> None:
    name = "damaged"
    environment = await settings(served, folder, name)
    with neuron_process(folder, served.address, *SERVICE, **environment) as neuron:
        before = await online(served, name)
        neuron.kill()
        for file in ("spool.sqlite3", "spool.sqlite3-wal"):  # either could mend the other
            (neuron.state_dir / file).write_bytes(b"this is no database" * 1000)
        neuron.start()
        await online(served, name, epoch=before.session.epoch + 1)
        assert (await answer(served, name, "isolated", a=4))["twice"] == 8
        assert len(neuron.logged("spool.set_aside")) == 1
        assert not (await spool(served, name)).in_memory
