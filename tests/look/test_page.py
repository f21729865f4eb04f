"""The page of runs: nothing injected, nothing asked for, and used in a real browser on a wide and a narrow screen."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from browser import browse, frames
from markupsafe import escape

from recbole_llm.look.columns import Column
from recbole_llm.look.page import to_html

SCRIPT = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"
NASTY = [
    SCRIPT,
    "a]]><!--\u2028line\u2029 <b>&amp;\u202ederorrim",
    "{{ 7 * 7 }} ${8} `'\"\\",
    "Amélie " + "x" * 400,
    "\u0000 \U0001f600",
]


def column(name: str, row: str = "Model") -> Column:
    record = {"model": "Model", "seed": 2020, "results": {row: {"hit@1": 0.25, "hit@5": 0.5, "ndcg@5": 0.375}}}
    return Column(name, Path("saved/runs/Model-songs-1/record.json"), record, row)


def made(columns: int = 2, users: int = 45) -> tuple[dict[str, Any], list[Column]]:
    """User u has u + 1 items; one model ranks the target 1 + u % 3, the next 1 + u % 2, the third not at all."""
    titles = [*NASTY, *(f"Song {place}" for place in range(len(NASTY), 60))]
    items = [
        [f"i{place}", title, f"{1960 + place} · <i>rock</i>", SCRIPT if place == 7 else ""] for place, title in enumerate(titles)
    ]
    lines = []
    for user in range(users):
        ranks = [1 + user % 3, 1 + user % 2, None][:columns]
        target = 10 + user % 40
        others = [place for place in range(20) if place != target][:5]
        lists = []
        for rank in ranks:
            own = others if rank is None or rank > 2 else [*others[: rank - 1], target, *others[rank - 1 : 4]]
            lists.append([rank, own[:2], [0.5, -1.25e-5], None if rank is None else -7.5])
        lines.append(
            {
                "id": f"u{user}" if user else SCRIPT,
                "history": [(user + place) % 60 for place in range(min(user + 1, 50))],
                "length": user + 1,
                "target": target,
                "trained": user % 4,
                "cold": user % 4 == 0,
                "ranked": lists,
            }
        )
    names = ["First", SCRIPT, "Third"][:columns]
    content = {
        "dataset": f"songs {SCRIPT}",
        "evaluated": 1234,
        "drawn": True,
        "width": 20,
        "candidates": "a" * 64,
        "masked": False,
        "top": 2,
        "columns": [{"name": name, "odd": place} for place, name in enumerate(names)],
        "items": items,
        "users": lines,
    }
    return content, [column(name) for name in names]


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(*made())


def test_the_page_shows_foreign_text_as_text_and_asks_for_nothing(page: str) -> None:
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page and "<!--" not in page
    assert "\u2028" not in page and "\u202e" not in page and str(escape(SCRIPT)) in page
    page = page.replace(str(escape(SCRIPT)), "")
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert "script-src 'sha256-" in page
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found and json.loads(found[1]) == made()[0]
    rest = page.replace(found[1], "")
    assert not re.search(r"https?:|//\w|\ssrc=|url\(|href=|@import|<link|\son\w+=|innerHTML", rest)


def test_what_the_page_says_of_its_content(page: str) -> None:
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.split("<form")[0].split("<main>")[1]))
    assert "45 of 1,234 test users, drawn with seed 2020. Each model ranked the same 20 candidates of a user" in text
    assert "Lists show the best 2, histories the last 50 items" in text and "hit@1 hit@5 ndcg@5" in text
    assert "for 1 users, the list computed for this page disagrees with the recorded rank" in text
    content, columns = made(1)
    content |= {"candidates": None, "masked": True, "width": 1682, "drawn": False}
    text = re.sub(r"\s+", " ", to_html(content, columns))
    assert (
        "Each model ranked the catalogue of 1,682 items, the history left out" in text
        and "drawn with" not in text.split("<form")[0]
    )


# --- a real browser

_PROBE = """
<script>
addEventListener("load", () => {
  const seen = () => ({
    users: [...document.querySelectorAll(".user h2 bdi")].map(one => one.textContent),
    count: at("count").textContent, hash: location.hash, more: !at("more").hidden,
  });
  const set = (id, value) => {
    const field = at(id);
    field.focus();
    if (field.type === "checkbox") field.click();
    else { field.value = value; field.dispatchEvent(new Event("input", {bubbles: true})); }
    return seen();
  };
  const clear = () => { history.replaceState(null, "", "#"); read(); };
  const first = document.querySelector(".user");
  const found = {start: seen()};
  found.card = {
    truth: first.querySelector(".truth").innerText,
    heads: [...first.querySelectorAll("h3")].map(one => one.innerText),
    lists: [...first.querySelectorAll("ol")].map(one => [...one.children].map(line => `${line.value} ${line.innerText}`)),
  };
  at("more").focus();
  document.activeElement.click();
  found.more = {...seen(), focus: document.activeElement.querySelector("h2 bdi").textContent};
  found.short = set("short");
  clear();
  found.cold = set("cold");
  clear();
  found.ab = set("show", "ab");
  found.swapped = (set("a", "1"), set("b", "0"));
  found.top3 = set("n", "3");
  clear();
  found.title = set("q", "AMELIE");
  found.user = set("q", "u44 song");
  found.markup = set("q", "<" + "/script><script>");
  clear();
  found.lead = set("by", "lead");
  at("clear").focus();
  document.activeElement.click();
  found.reset = seen();
  location.hash = "#show=ba&n=1&q=u1&cold=1&unknown=1&a=99";
  setTimeout(() => {
    found.link = seen();
    found.fields = ["show", "n", "q", "a"].map(id => at(id).value);
    found.title_of_page = document.title;
    found.elements = [document.scripts.length, document.images.length, document.querySelectorAll(".user i, .user b").length];
    found.unlabelled = [...document.querySelectorAll("input, select")].filter(one => !one.labels.length).length;
    document.body.textContent = "found" + JSON.stringify(found) + "end";
  }, 50);
});
</script>
"""


def probed(page: str, script: str) -> str:
    """The page with another script, which its policy would refuse."""
    return re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", page).replace("</body>", f"{script}</body>")


def told(printed: str) -> Any:
    found = re.search(r"found([\[{].*[\]}])end", printed, re.DOTALL)
    assert found, printed[:2000]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
def test_a_browser_filters_searches_and_keeps_the_state_in_the_address(page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(probed(page, _PROBE), encoding="utf-8")
    printed, console = browse(file, "--dump-dom", "--virtual-time-budget=3000", "--window-size=1200,900")
    assert console == ""
    found = told(printed)
    names = [SCRIPT, *(f"u{user}" for user in range(1, 45))]

    def where(kept: Any) -> list[str]:
        return [names[user] for user in range(45) if kept(user)]

    def one(user: int) -> int:
        return 1 + user % 3

    def two(user: int) -> int:
        return 1 + user % 2

    assert found["start"] == {"users": names[:20], "count": "45 of 45 users", "hash": "", "more": True}
    assert found["more"]["users"] == names[:40] and found["more"]["focus"] == names[20]
    assert found["card"]["truth"].startswith("target: Song 10 1970 · <i>rock</i> (0 training interactions, cold)")
    assert found["card"]["heads"] == [
        "history of 1, the latest first",
        "First ✓ target at 1 of 20",
        f"{SCRIPT} ✓ target at 1 of 20",
    ]
    assert found["card"]["lists"][0] == [
        "1 Song 10 1970 · <i>rock</i> 0.5 ✓ the target",
        f"2 {SCRIPT} 1960 · <i>rock</i> -0.0000125",
    ]
    assert found["short"]["users"] == names[:12] and found["short"]["count"] == "12 of 45 users"
    assert found["cold"]["users"] == where(lambda user: user % 4 == 0)
    assert found["ab"]["users"] == where(lambda user: one(user) == 1 < two(user)) and found["ab"]["hash"] == "#show=ab"
    assert found["swapped"]["users"] == where(lambda user: two(user) == 1 < one(user))[:20]
    assert found["top3"]["count"] == "0 of 45 users"  # both are right for all
    amelie = where(lambda user: 3 in {(user + place) % 60 for place in range(user + 1)} | {0, 1})
    assert found["title"]["count"] == f"{len(amelie)} of 45 users" and found["title"]["users"] == amelie[:20]
    assert found["user"]["users"] == ["u44"] and found["markup"]["count"] == "45 of 45 users"
    lead = sorted(range(45), key=lambda user: 1 / two(user) - 1 / one(user))
    assert found["lead"]["users"] == [names[user] for user in lead[:20]]
    assert found["reset"] == {**found["start"], "hash": ""}
    assert found["link"]["users"] == where(lambda user: two(user) == 1 < one(user) and user % 4 == 0 and "u1" in f"u{user}")
    assert found["fields"] == ["ba", "1", "u1", "0"] and found["unlabelled"] == 0
    assert found["title_of_page"].endswith(SCRIPT) and found["elements"] == [3, 0, 0]


_MEASURE = """
<script>
addEventListener("load", () => {
  const [root, columns] = [document.documentElement, [...document.querySelector(".columns").children]];
  const stands = getComputedStyle(document.querySelector(".stand")).display !== "none";
  const rows = new Set(columns.map(one => Math.round(one.getBoundingClientRect().top))).size;
  parent.postMessage(JSON.stringify({width: innerWidth, page: root.scrollWidth, rows, stands}), "*");
});
</script>
"""
_FRAMES = frames(("page.html", 375), ("page.html", 320), ("page.html", 1400))


@pytest.mark.slow
def test_wide_and_narrow_screens_show_the_page_without_scrolling_sideways(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(probed(to_html(*made(3)), _MEASURE), encoding="utf-8")
    (tmp_path / "frames.html").write_text(_FRAMES, encoding="utf-8")
    printed, console = browse(tmp_path / "frames.html", "--dump-dom", "--virtual-time-budget=5000", "--window-size=1600,1000")
    assert console == ""
    screens = {screen["width"]: screen for screen in told(printed)}
    assert sorted(screens) == [320, 375, 1400] and all(screen["page"] <= width for width, screen in screens.items())
    assert [screens[width]["rows"] for width in (375, 1400)] == [4, 1]  # one below the other, or side by side
    assert [screens[width]["stands"] for width in (375, 1400)] == [True, False]


@pytest.mark.slow
def test_a_browser_runs_the_page_under_its_own_policy_and_in_the_dark(page: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    printed, console = browse(file, "--dump-dom")
    assert console == "" and printed.count('class="user"') == 20
    papers = {}
    for name, option in (
        ("light", "--blink-settings=preferredColorScheme=1"),
        ("dark", "--blink-settings=preferredColorScheme=0"),
    ):
        _, console = browse(file, f"--screenshot={tmp_path / name}.png", "--window-size=900,900", option)
        assert console == ""
        papers[name] = (matplotlib.image.imread(tmp_path / f"{name}.png")[0, 0, :3] * 255).round().astype(int)
    assert np.array_equal(papers["light"], [0xFC, 0xFC, 0xFB]) and np.array_equal(papers["dark"], [0x15, 0x17, 0x1A])
    file.write_text(page.replace("</body>", "<script>console.log('ran')</script></body>"), encoding="utf-8")
    refused = browse(file, "--dump-dom")[1]
    assert "Content Security Policy" in refused and "'ran'" not in refused  # only the page's own script runs
