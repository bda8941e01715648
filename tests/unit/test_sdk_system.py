"""What the host and the process look like, also where the system does not want to tell."""

from __future__ import annotations

import os
import platform
from collections import namedtuple
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from neuron_sdk.system import SystemProbe

CpuTimes = namedtuple("CpuTimes", ["user", "system", "idle", "iowait", "guest"])


class Clock:
    """Seconds moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def host_reads(monkeypatch: pytest.MonkeyPatch, *readings: CpuTimes) -> None:
    """The system tells these processor times, one a call."""
    waiting = iter(readings)
    monkeypatch.setattr(psutil, "cpu_times", lambda: next(waiting))


def test_a_sample_of_this_machine_lies_within_the_contracts_ranges(tmp_path: Path) -> None:
    sample = SystemProbe().sample(tmp_path)
    for percent in (sample.cpu_percent, sample.memory_percent, sample.disk_percent):
        assert 0 <= percent <= 100
    assert sample.memory_used_bytes > 0
    assert sample.disk_used_bytes > 0


def test_the_process_is_this_one() -> None:
    process = SystemProbe().process()
    assert process.pid == os.getpid()
    assert process.threads >= 1
    assert process.rss_bytes > 1_000_000
    assert process.open_files >= 3
    assert process.cpu_percent >= 0


def test_the_host_is_named_within_the_contracts_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    host = SystemProbe().host()
    assert host.os == f"{platform.system()} {platform.release()}"
    assert host.architecture == platform.machine()
    assert host.cpu_count == os.cpu_count()
    assert host.memory_bytes == psutil.virtual_memory().total

    monkeypatch.setattr("socket.gethostname", lambda: "h" * 300)
    monkeypatch.setattr(platform, "release", lambda: "r" * 300)
    monkeypatch.setattr(platform, "machine", lambda: "m" * 300)
    host = SystemProbe().host()
    assert (len(host.hostname), len(host.os), len(host.architecture)) == (256, 128, 64)


def test_processor_use_is_over_the_time_since_the_sample_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host_reads(
        monkeypatch,
        CpuTimes(user=10, system=10, idle=80, iowait=0, guest=0),
        CpuTimes(user=13, system=11, idle=86, iowait=0, guest=0),
        CpuTimes(user=13, system=11, idle=96, iowait=0, guest=0),
    )
    clock = Clock()
    probe = SystemProbe(clock=clock)
    clock.now += 10
    assert probe.sample(tmp_path).cpu_percent == pytest.approx(40)
    clock.now += 10
    assert probe.sample(tmp_path).cpu_percent == 0


def test_waiting_for_the_disk_is_no_use_and_a_guests_time_counts_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host_reads(
        monkeypatch,
        CpuTimes(user=0, system=0, idle=0, iowait=0, guest=0),
        CpuTimes(user=50, system=0, idle=25, iowait=25, guest=50),
    )
    probe = SystemProbe()
    assert probe.sample(tmp_path).cpu_percent == 50


def test_two_readers_at_the_same_moment_see_the_same_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host_reads(
        monkeypatch,
        CpuTimes(user=0, system=0, idle=0, iowait=0, guest=0),
        CpuTimes(user=30, system=0, idle=70, iowait=0, guest=0),
    )
    clock = Clock()
    probe = SystemProbe(clock=clock)
    clock.now += 10
    assert probe.sample(tmp_path).cpu_percent == 30
    clock.now += 0.1
    assert probe.sample(tmp_path).cpu_percent == 30


def test_counters_that_run_backwards_give_no_use_below_zero(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    host_reads(
        monkeypatch,
        CpuTimes(user=50, system=0, idle=50, iowait=0, guest=0),
        CpuTimes(user=40, system=0, idle=90, iowait=0, guest=0),
    )
    assert SystemProbe().sample(tmp_path).cpu_percent == 0


def test_the_process_may_use_more_than_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    process_times = namedtuple("process_times", ["user", "system"])
    readings = iter([process_times(1, 0), process_times(4, 1)])
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _self: next(readings))
    clock = Clock()
    probe = SystemProbe(clock=clock)
    clock.now += 2
    assert probe.process().cpu_percent == pytest.approx(200)


def refuse(error: Exception) -> Callable[..., NoReturn]:
    def refused(*_args: object, **_kwargs: object) -> NoReturn:
        raise error

    return refused


@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(), psutil.NoSuchProcess(1), PermissionError(), RuntimeError()]
)
def test_what_the_system_refuses_is_zero_and_never_an_exception(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    for name in ("cpu_times", "virtual_memory", "disk_usage", "net_io_counters"):
        monkeypatch.setattr(psutil, name, refuse(error))
    for name in ("cpu_times", "memory_info", "num_threads", "num_fds"):
        monkeypatch.setattr(psutil.Process, name, refuse(error))
    probe = SystemProbe()
    assert set(astuple(probe.sample(tmp_path))) == {0}
    assert set(astuple(probe.process())) == {0, os.getpid()}
    assert probe.host().memory_bytes == 0


def test_a_host_without_network_interfaces_has_moved_no_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    sample = SystemProbe().sample(tmp_path)
    assert (sample.network_received_bytes, sample.network_sent_bytes) == (0, 0)


def test_a_disk_that_is_not_there_is_zero(tmp_path: Path) -> None:
    sample = SystemProbe().sample(tmp_path / "missing")
    assert (sample.disk_percent, sample.disk_used_bytes) == (0, 0)
