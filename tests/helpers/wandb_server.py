"""wandb's server as recorded answers: `wandb.Api` itself runs, on a wire that ends here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

PER_PAGE = 2  # of runs; the client asks for more, and the server gives what it likes


@dataclass
class Recorded:
    """A run as the server has it; `summary` is what stands in its JSON, or None."""

    id: str
    name: str | None
    state: str
    config: dict[str, Any] | None
    summary: dict[str, Any] | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def node(self) -> dict[str, Any]:
        wrapped = None
        if self.config is not None:
            wrapped = json.dumps({k: {"value": v, "desc": None} for k, v in self.config.items()})
        return {
            "id": f"node-{self.id}",
            "projectId": "7",
            "name": self.id,
            "displayName": self.name,
            "state": self.state,
            "tags": [],
            "sweepName": None,
            "config": wrapped,
            "systemMetrics": "{}",
            "summaryMetrics": None if self.summary is None else json.dumps(self.summary),
            "historyKeys": {"lastStep": self.rows[-1]["_step"]} if self.rows else None,
            "user": {"name": "Me", "username": "me"},
        }


def installed(monkeypatch, projects: dict[str, list[Recorded]]) -> list[str]:
    """Put the answers in place of the connection; the queries that come are in the list."""
    asked: list[str] = []

    class Service:
        base_url = app_url = "https://wandb.example/"

        def __init__(self, settings, timeout=None):
            self.scans: list[Recorded] = []

        def authenticate(self):
            asked.append("authenticate")

        def finalize(self, obj, cleanup):
            return lambda: None

        def execute_graphql(self, query, variables=None, timeout=None, *, parse=None, **_):
            if parse is not None:
                return parse('{"viewer": {"id": "v", "entity": "me"}}')
            path = f"{variables['entity']}/{variables['project']}"
            runs = projects.get(path)
            if runs is None:
                return {"project": None}
            if "query Runs(" in query:
                return {"project": self.page(runs, variables)}
            one = next((run for run in runs if run.id == variables["name"]), None)
            return {"project": {"run": None if one is None else one.node()}}

        def page(self, runs, variables):
            asked.append(f"runs after {variables['cursor']}")
            start = int(variables["cursor"] or 0)
            some = runs[start : start + PER_PAGE]
            edges = [
                {"node": run.node(), "cursor": str(start + i)} for i, run in enumerate(some, 1)
            ]
            more = start + PER_PAGE < len(runs)
            found = {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": more}}
            return {"internalId": "7", "runCount": len(runs), "readOnly": False, "runs": found}

        def send_api_request(self, request, timeout=None):
            from wandb.proto import wandb_api_pb2 as pb

            response, of = pb.ApiResponse(), request.read_run_history_request
            answer = response.read_run_history_response
            if of.HasField("scan_run_history_init"):
                begun = of.scan_run_history_init
                path = f"{begun.entity}/{begun.project}"
                self.scans += [run for run in projects[path] if run.id == begun.run_id]
                answer.scan_run_history_init.request_id = len(self.scans) - 1
                return response
            scan = of.scan_run_history
            asked.append(f"rows from {scan.min_step}")
            for row in self.scans[scan.request_id].rows:
                if scan.min_step <= row["_step"] < scan.max_step:
                    items = answer.run_history.history_rows.add().history_items
                    for key, value in row.items():
                        items.add(key=key, value_json=json.dumps(value))
            return response

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("wandb.apis.public.api.ServiceApi", Service)
    return asked
