"""What tests share of traces is what each would have traced by itself."""

from __future__ import annotations

import pytest
import traces

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost.devices import CPU, find_device
from lbaccel.planning.cost.update import classification_loss
from lbaccel.planning.estimate import Estimator
from lbaccel.planning.network import Trained, network_of


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(traces, "_known", {})


def an_estimator(*, optimizer="sgd", device=CPU, norm=8, img_size=32, precision="fp32"):
    trained = Trained(
        model="resnet10t", img_size=img_size, num_classes=10, optimizer=optimizer, make_batch=None,
        loss_fn=classification_loss, clips=False, precision=precision,
    )  # fmt: skip
    network = network_of(trained, device)
    plan = BatchPlan(global_batch_size=32, micro_batch_size=8, norm_batch_size=norm)
    return Estimator(network, plan, device, precision)


def test_a_shared_estimate_is_that_of_a_trace_of_its_own():
    alone = an_estimator()
    truth = alone.estimate(Candidate(16))
    with traces.shared():
        first, second = an_estimator(), an_estimator()
        assert first.estimate(Candidate(16)) == truth
        with pytest.MonkeyPatch.context() as patch:  # traced already
            patch.setattr(Estimator, "_trace", lambda *_: pytest.fail("traced again"))
            assert second.estimate(Candidate(16)) == truth
            assert second.survey(8).units == alone.units
        assert second.num_traces == alone.num_traces
        assert second.workspaces() == alone.workspaces()


@pytest.mark.parametrize(
    "other",
    [
        {"optimizer": "adamw"},
        {"device": find_device("RTX 3060")},
        {"norm": 4},
        {"img_size": 64},
        {"precision": "bf16"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_contract_shares_nothing(other):
    known = {traces.fingerprint(an_estimator()), traces.fingerprint(an_estimator(**other))}
    assert len(known) == 2 and None not in known
