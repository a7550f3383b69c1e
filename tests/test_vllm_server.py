"""The port of a server that is started: free, and still free when the server binds it seconds later."""

import socket
from pathlib import Path

import pytest

from vllm_power.tools.common import vllm_server


def handed_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: int) -> None:
    """Let the system hand out the ports from ``first`` on."""
    file = tmp_path / "range"
    file.write_text(f"{first}\t60999\n")
    monkeypatch.setattr(vllm_server, "PORTS_HANDED_OUT", file)


def test_nobody_is_given_the_port_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handed_out(monkeypatch, tmp_path, 20_000)
    ports = {vllm_server.free_port() for _ in range(20)}
    assert len(ports) > 15 and all(10_000 <= port < 20_000 for port in ports)


def test_a_port_in_use_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as listener:
        taken = vllm_server.free_port()
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        handed_out(monkeypatch, tmp_path, 10_001)
        monkeypatch.setattr(vllm_server.random.SystemRandom, "sample", lambda self, ports, count: [taken])
        assert vllm_server.free_port() != taken


def test_a_system_that_hands_out_all_ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handed_out(monkeypatch, tmp_path, 1024)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", vllm_server.free_port()))
