"""Each test gets a fresh Accelerate state, one thread, and no wandb or cache outside its folder."""

from __future__ import annotations

import signal

import pytest
import torch

# A shell's background job ignores Ctrl-C, and a run keeps that; tests that send one expect a run
# in the foreground.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch, tmp_path_factory):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    torch.manual_seed(0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("LBACCEL_KERNELS", "off")
    monkeypatch.setenv("LBACCEL_ESTIMATES", "off")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.fixture(scope="module")
def shared_traces():
    """For modules whose tests plan the same networks: each candidate is traced once a process."""
    import traces

    with traces.shared():
        yield


def pytest_configure():
    torch.set_num_threads(1)


def pytest_unconfigure():
    import places

    places.remove_all()
