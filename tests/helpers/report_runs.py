"""Run folders as `lbaccel train` leaves them, made by hand, for reports."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import yaml

VOID = {"meta", "br", "img", "path", "hr", "input", "link"}


def a_run_folder(path, *, top=90.0, updates=40, evals=12, batch=64, status="done", **settings):
    """A run whose top-1 rises to about `top`; each evaluation stands at a share of the updates."""
    path.mkdir(parents=True)
    config = {"model": "vit", "global_batch_size": batch, "data": "digits", "seed": 0, **settings}
    plan = {"equation": f"global batch {batch}", "world_size": 1, "num_updates": updates}
    asked = {key: value for key, value in config.items() if key in ("model", "seed", "base_lr")}
    whole = {**config, "asked": asked, "plan": plan, "origin": dict.fromkeys(config, "flag")}
    (path / "config.yaml").write_text(yaml.safe_dump(whole))
    rows = []
    for u in range(1, updates + 1):
        share = u / updates
        right = top * (1 - math.exp(-5 * share)) + math.sin(u)
        where = {"update": u, "samples_seen": u * batch, "perf/seconds": 0.36 * u}
        rows.append({**where, "train/loss": 2.5 - right / 50, "train/top1": right, "optim/lr": 0.1})
        if u % max(1, updates // evals) == 0:
            rows.append({**where, "val/loss": 2.6 - right / 50, "val/top1": right - 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"status": status, "num_updates": updates, "samples_seen": updates * batch}
    (path / "summary.json").write_text(json.dumps({**summary, "seconds": 14.4, "peak_gib": 0.5}))
    env = {
        "command": "lbaccel train --model vit",
        "git_commit": "4683c41",
        "devices": ["cpu"],
        "cpu_count": 2,
        "python": "3.11.7",
        "versions": {"torch": "2.15.0"},
    }
    (path / "env.json").write_text(json.dumps(env))
    return path


class Page(HTMLParser):
    """A page in parts: the elements with their attributes, text outside of scripts, and scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], ""
        self.scripts, self.unclosed = {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts[dict(attrs).get("id", "")] = ""
            self.current = dict(attrs).get("id", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unclosed.append((tag, self.open[-3:]))

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.current] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += data

    def charts(self):
        """The charts of the script by key; each line with the style in which it is drawn."""
        found = json.loads(self.scripts["curves"])
        for key, chart in found.items():
            start = self.elements.index(
                ("figure", {"class": "chart", "id": key, "data-chart": key})
            )
            drawn = [attrs["class"] for tag, attrs in self.elements[start:] if tag == "g"]
            for line, style in zip(chart["lines"], drawn, strict=False):
                line["style"] = style.split()[0]
        return found

    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]
