"""Pages in headless Chromium: the script runs, the switch works, and a phone is wide enough."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from itertools import pairwise

import pytest
from report_runs import Page, a_run_folder
from study_results import a_study_result

from lbaccel.report.of_study import of_study
from lbaccel.report.page import page
from lbaccel.report.parts import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
PHONE, DESKTOP = 390, 1280
# A window of Chromium is at least 500 pixels wide, so the page stands in a frame of the width.
FRAME = """<!doctype html><body style="margin:0">
<iframe width="{width}" height="900" srcdoc="{page}"></iframe><pre id="found"></pre><script>
onload = () => setTimeout(() => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  const root = page.documentElement;
  const found = {{ready: root.dataset.ready, error: root.dataset.error}};
  found.width = root.scrollWidth;
  found.frame = root.clientWidth;
  {more}
  document.getElementById("found").textContent = JSON.stringify(found);
}}, 100);
</script>"""


def in_chromium(file, *flags):
    """Standard output; a Chromium that hangs, as one in a hundred does, is started again."""
    for attempt in range(3):
        command = [
            *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
            f"--user-data-dir={file.parent / f'profile-{attempt}'}",
            *("--virtual-time-budget=4000", *flags, file.as_uri()),
        ]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # its helpers too
                continue
        assert process.returncode == 0, err[-2000:]
        return out
    return pytest.fail("Chromium hung three times")


def measured(text, folder, *, width=DESKTOP, more=""):
    """What a page in a frame of this width says of itself, after `more` of JavaScript."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(width=width, page=html.escape(text), more=more))
    found = re.search(r'<pre id="found">(.*?)</pre>', in_chromium(file, "--dump-dom"), re.S)
    assert found and found[1], "the page did not come to its end"
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def of_six(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    runs = [
        a_run_folder(folder / f"lr{lr}-{seed}", top=90 + seed, base_lr=lr, seed=seed)
        for lr in (0.1, 0.4)
        for seed in range(3)
    ]
    return report(runs, target=85.0)[0]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    run = a_run_folder(tmp_path_factory.mktemp("one") / ("a-long-name-" * 8))
    line = {"update": 20, "plan": "global batch 64", "world_size": 2}
    (run / "resumes.jsonl").write_text(json.dumps(line) + "\n")
    return report([run])[0]


@pytest.fixture(scope="module")
def of_a_study(tmp_path_factory):
    return page([of_study(a_study_result(), tmp_path_factory.mktemp("study"))])


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["of_six", "of_one", "of_a_study"])
def test_the_script_runs_and_nothing_is_wider_than_the_window(name, width, request, tmp_path):
    found = measured(request.getfixturevalue(name), tmp_path, width=width)
    assert found["ready"] == "yes" and found.get("error") is None
    assert found["width"] <= found["frame"]


def test_an_error_of_the_script_would_be_seen(of_six, tmp_path):
    broken = of_six.replace('id="curves">{', 'id="curves">{,')
    found = measured(broken, tmp_path)
    assert found.get("ready") is None


SWITCH = """
  const at = (key) => page.getElementById(key);
  const press = (name) => page.querySelector(`.switch button[${name}]`).click();
  const paths = ".switchable .l, .switchable .mark, .switchable .grid";
  const drawn = () => [...page.querySelectorAll(paths)]
    .map((path) => path.getAttribute("d")).concat(
      [...page.querySelectorAll(".switchable .words span")].map(
        (s) => s.textContent + s.style.left + s.style.top));
  const before = drawn();
  press('data-axis="updates"');
  found.updates = at("runs-3").querySelector(".xlabel").textContent;
  found.ticks = [...at("runs-3").querySelectorAll(".tick.x")].map((t) => t.textContent);
  press('data-axis="hours"'); press('data-log="y"');
  found.log = [...at("runs-0").querySelectorAll(".tick.y")].map((t) => parseFloat(t.style.top));
  found.pressed = page.querySelector('[data-log="y"]').getAttribute("aria-pressed");
  found.moved = drawn().join() !== before.join();
  press('data-axis="samples"'); press('data-log="y"');
  const after = drawn();
  found.differ = before.map((d, i) => [d, after[i]]).filter(([a, b]) => a !== b).slice(0, 3);
  found.length = [before.length, after.length];
"""


def test_the_switch_changes_the_axes_and_back_is_what_python_drew(of_six, tmp_path):
    found = measured(of_six, tmp_path, more=SWITCH)
    assert found["updates"] == "updates (optimizer steps)"
    assert found["ticks"] == ["10", "20", "30", "40"]
    assert found["moved"] and found["pressed"] == "true"
    gaps = [above - below for above, below in pairwise(found["log"])]
    assert len(gaps) > 1 and max(gaps) > 1.2 * min(gaps), "a log axis has ticks closer and closer"
    assert found["differ"] == [] and len(set(found["length"])) == 1


HOVER = """
  const plot = page.querySelector("#study-1-value .plot"), box = plot.getBoundingClientRect();
  const dot = {clientX: box.left + 0.04 * box.width, clientY: box.top + 0.8 * box.height};
  plot.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", dot));
  found.tip = plot.querySelector(".tip").textContent;
  plot.dispatchEvent(new frame.contentWindow.PointerEvent("pointerleave"));
  found.hidden = plot.querySelector(".tip").hidden;
"""


def test_a_point_says_its_value_under_the_pointer(of_a_study, tmp_path):
    found = measured(of_a_study, tmp_path, more=HOVER)
    assert re.fullmatch(r".+: [\d.]+( \(.+\))? at \d+ global batch size .+", found["tip"])
    assert found["hidden"] is True


CSV = """
  const blobs = [];
  frame.contentWindow.URL.createObjectURL = (blob) => { blobs.push(blob); return "data:,"; };
  page.querySelector('button[data-csv="runs-3"]').click();
  found.csv = blobs.length;
  found.hidden = page.querySelectorAll("button[hidden], .switch[hidden]").length;
"""


def test_each_chart_gives_a_csv(of_six, tmp_path):
    found = measured(of_six, tmp_path, more=CSV)
    assert found["csv"] == 1 and found["hidden"] == 0


def test_text_of_a_chart_does_not_overlap(of_a_study, tmp_path):
    more = """
      const spans = [...page.querySelectorAll("#study-1-updates .words span")];
      const boxes = spans.map((s) => s.getBoundingClientRect());
      found.over = [];
      boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b, j) => {
        if (a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom)
          found.over.push([spans[i].textContent, spans[i + 1 + j].textContent]);
      }));
      found.count = spans.length;
    """
    for width in (PHONE, DESKTOP):
        found = measured(of_a_study, tmp_path, width=width, more=more)
        assert found["over"] == [] and found["count"] > 10


@pytest.mark.slow
def test_a_reader_without_scripts_has_charts_and_tables(of_six, tmp_path):
    file = tmp_path / "still.html"
    file.write_text(re.sub(r"script-src '[^']+'", "script-src 'none'", of_six))
    found = Page(in_chromium(file, "--dump-dom"))
    assert "data-ready" not in dict(found.elements)["html"]
    assert "Numbers behind this chart" in found.text and "group 1" in found.text
    drawn = [
        attrs for tag, attrs in found.elements if tag == "path" and attrs.get("class") == "l s"
    ]
    assert len(drawn) > 30 and all(attrs["d"].startswith("M") for attrs in drawn if attrs["d"])


@pytest.mark.slow
def test_it_prints(of_six, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(of_six)
    in_chromium(file, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
