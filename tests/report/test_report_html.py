"""The page: well formed, self-contained, complete, safe, readable, small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from guidetune import report
from guidetune.errors import BadInput
from guidetune.report import heatmap, plots
from guidetune.report.text import clean

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Page(HTMLParser):
    """Checks that tags balance and keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {tag}" for tag in self.open]
        self.words = "".join(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"closes out of order: {tag} at {self.getpos()}")
        if tag in ("td", "th", "dt", "dd"):
            self.text.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title", "desc"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(run: Path) -> tuple[Page, str]:
    path = report.write(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.problems == []
    return page, text


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, str]:
    from conftest import build_run

    run = build_run(tmp_path_factory.mktemp("report") / "run", n=120)
    return run, *page_of(run)


def test_the_page_needs_nothing_outside_itself(full: tuple[Path, Page, str]) -> None:
    _, page, text = full
    assert text.startswith("<!DOCTYPE html>")
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"} == set()
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                assert (value or "").startswith("#"), (name, value)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", text)
    assert page.all("meta")[1]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_link_and_id_on_the_page_fits(full: tuple[Path, Page, str]) -> None:
    _, page, text = full
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, attrs in page.tags for name, value in attrs.items() if name == "href" and value}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)
    for name in (
        "verdict",
        "arms",
        "gain",
        "skills",
        "training",
        "guidance",
        "weights",
        "items",
        "data",
        "transfer",
        "costs",
        "recipe",
        "provenance",
    ):
        assert name in ids


def test_every_drawing_says_what_it_shows(full: tuple[Path, Page, str]) -> None:
    _, page, text = full
    drawings = page.all("svg")
    assert sum(attrs.get("class") == "plot" for attrs in drawings) == 6
    for attrs in drawings:
        assert attrs["role"] == "img"
        if "aria-label" in attrs:
            assert attrs["aria-label"]
            continue
        for name in (attrs["aria-labelledby"] or "").split():
            (said,) = re.findall(rf'<(?:title|desc) id="{name}">([^<]+)<', text)
            assert said.strip()
    assert not re.search(r"#0a0[bc]", text), "a placeholder colour was left in a drawing"
    assert "<metadata" not in text and "DejaVu Sans'" not in text


def test_arms_scores_and_tests_are_all_there(full: tuple[Path, Page, str]) -> None:
    run, page, _ = full
    arms = results_of(run)["arms"]
    for name, arm in arms.items():
        assert name in page.words
        for group in ("task", "general"):
            for label, result in arm[group].items():
                assert label in page.words
                assert f"{result['score']:.3f}" in page.words
                if name != "instruct":
                    counts = result["vs_instruct"]
                    for key in ("kept", "lost", "gained"):
                        assert re.search(rf"\b{counts[key]}\b", page.words)
    for text in (
        "181,240",
        "4,000",
        "3,921",
        "8.3 %",
        "longer than max_length",
        "assistant message has no text",
        "LlamaForCausalLM",
        "2.13.0",
        "1.4 GB",
    ):
        assert text in page.words, text
    for skill in ("JSON format", "drug to disease"):
        assert skill in page.words


def test_the_browser_holds_every_arms_gained_and_lost_items(full: tuple[Path, Page, str]) -> None:
    from guidetune.report.samples import PER_KIND, collect

    run, page, text = full
    results = results_of(run)
    tasks, missing = collect(run, results)
    assert missing == []
    assert [(task.group, task.label) for task in tasks] == [("task", "word_problems"), ("general", "skills")]
    for task in tasks:
        assert [one.arm for one in task.arms] == ["sft", "graft", "gift"]
        for one in task.arms:
            counts = results["arms"][one.arm][task.group][task.label]["vs_instruct"]
            assert (one.gained_total, one.lost_total) == (counts["gained"], counts["lost"])
            for kind, entries, total in (("gained", one.gained, one.gained_total), ("lost", one.lost, one.lost_total)):
                assert min(PER_KIND, total) <= len(entries) <= total
                for sample, _ in entries:
                    right = {arm: output.right for output in sample.outputs for arm in output.arms}
                    assert sorted(right) == ["gift", "graft", "instruct", "sft"], "every arm's answer is there"
                    assert right["instruct"] is (kind == "lost") and right[one.arm] is (kind == "gained")
        shown = {sample.anchor for one in task.arms for sample, _ in [*one.gained, *one.lost]} | {s.anchor for _, s in task.others}
        for anchor in shown:  # in full exactly once, also where several arms changed the same item
            assert text.count(f'id="{anchor}"') == 1
    assert {kind for task in tasks for kind, _ in task.others} >= {"right in every arm", "wrong in every arm"}
    assert page.words.count("✓") and page.words.count("✗")
    assert len(page.all("details")) > 20 and len(page.all("details")) == len(page.all("summary"))


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, str]:
    from conftest import build_run, every_field

    run = build_run(tmp_path_factory.mktemp("every") / "run", n=60, change=every_field)
    return run, *page_of(run)


def test_what_only_some_runs_have_is_shown_where_it_is(full: tuple[Path, Page, str], every: tuple[Path, Page, str]) -> None:
    _, plain, _ = full
    run, page, text = every
    words = " ".join(page.words.split())
    for said in (
        "Only gift is shown to be better on the whole.",
        "Stored sentence on gift and task",
        "gift on word_problems in words.",
        "sft and gift on word_problems.",
        "Every trained arm had the same budget.",
        "most task gain with at most 0.02 lost on general skills, on validation",
        "sft at scale 0.75 in words.",
        "11,763",
        "word_problems: Refusals are found by a list of phrases.",
        "word_problems: Two programs were stopped. (gift)",
        "0.061",
    ):
        assert said in words, said
        assert said not in " ".join(plain.words.split()), said
    assert words.count("Stored sentence on gift and task") == 1, "with its arm, not once more among the sentences of the whole"
    assert {"scale", "samplings"} <= {attrs.get("id") for _, attrs in page.tags}
    assert sum(attrs.get("class") == "plot" for attrs in page.all("svg")) == 8
    pass_at_4 = results_of(run)["arms"]["gift"]["task"]["word_problems"]["curves"]["pass"][2]
    assert f"{pass_at_4:.3f}" in words
    results = results_of(run)
    results["budget_equal"] = False
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    assert "did not have the same budget" in page_of(run)[0].words


def test_pass_at_k_among_the_metrics_is_drawn_where_no_curve_is_stored(make_run) -> None:
    def change(results: dict) -> None:
        results["arms"]["gift"]["task"]["word_problems"]["metrics"] |= {"pass@1": 0.31, "pass@2": 0.47, "avg@2": 0.31}

    page, _ = page_of(make_run(n=24, arms=("instruct", "gift"), change=change))
    assert "Several answers per item" in page.words and "0.470" in page.words


@pytest.mark.parametrize("which", ["full", "every"])
def test_the_page_can_be_used_without_seeing_it(which: str, request: pytest.FixtureRequest) -> None:
    _, page, text = request.getfixturevalue(which)
    assert page.all("html")[0]["lang"] == "en"
    assert [len(page.all(tag)) for tag in ("header", "main", "footer", "nav", "h1")] == [1] * 5
    assert page.all("nav")[0]["aria-label"]
    skip = page.all("a")[0]
    assert skip["class"] == "skip" and page.tags.index(("a", skip)) < page.tags.index(("header", page.all("header")[0]))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False)), "no level of headings is left out"
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        heads = re.findall(r"<th\b([^>]*)>", table)
        assert heads and all('scope="' in head for head in heads)
        columns = sum(int(n or 1) for n in re.findall(r'<th scope="col"[^>]*?(?:colspan="(\d+)")?[^>]*>', table))
        for row in re.findall(r"<tr\b.*?</tr>", table[table.index("</thead>") :], re.DOTALL):
            cells = sum(int(n or 1) for n in re.findall(r'<t[dh]\b(?:[^>]*?colspan="(\d+)")?', row))
            assert cells in (columns, columns - 1, columns - 2), (columns, row)  # arm and time span the rows of an arm
    for _, attrs in page.tags:
        if attrs.get("tabindex") == "0":  # what can be scrolled can be reached and has a name
            assert attrs["role"] == "region" and attrs["aria-label"]
    for details in re.findall(r"<details[^>]*>\s*<(\w+)", text):
        assert details == "summary"


def test_the_same_run_gives_the_same_page(full: tuple[Path, Page, str]) -> None:
    run, _, text = full
    assert report.write(run).read_text(encoding="utf-8") == text


LONG = "x" * 20_000
HOSTILE = (
    "</pre></style><script>alert(1)</script><img src=http://x.example/a onerror=alert(2)> $\\frac{a}$ & \" ' {{ 7*7 }} "
    "\x00\x1b[31m \ud800 \u202e evil"
)
POISON = (
    HOSTILE
    + "</details></section></main><style>*{display:none}</style><svg onload=alert(3)><a href='javascript:alert(4)'>\u2066\x85"
    + LONG
)


def test_hostile_text_is_shown_and_never_acted_on(make_run) -> None:
    def change(results: dict) -> None:
        results["name"] = HOSTILE
        results["models"]["instruct"] = HOSTILE
        results["recipe"]["name"] = HOSTILE
        results["ledger"]["dropped"][HOSTILE] = 3
        results["ledger"]["sources"][HOSTILE] = {"read": 1}
        results["versions"][HOSTILE] = HOSTILE
        results["guidance"]["teacher"] = HOSTILE
        results["arms"]["gift"]["transfer"] = {HOSTILE: {HOSTILE: [HOSTILE]}}
        results["arms"]["gift"]["description"] = HOSTILE
        results["arms"] = {(f"gift {HOSTILE}" if name == "gift" else name): arm for name, arm in results["arms"].items()}
        results["arms"]["sft"] = {"status": "failed", "error": HOSTILE}
        for arm in results["arms"].values():
            if "general" in arm:
                arm["general"]["skills"]["by"]["skill"][HOSTILE] = {"score": 0.5, "n": 4}
                arm["task"]["word_problems"]["by"]["difficulty"][HOSTILE] = {"score": 0.5, "n": 4}
                arm["task"] = {HOSTILE: arm["task"]["word_problems"]}

    def rewrite(item: dict) -> None:
        item["prompt"] = item["output"] = item["reference"] = POISON
        item["id"] += HOSTILE

    page, text = page_of(make_run(n=24, change=change, rewrite=rewrite))
    assert not page.all("script") and not page.all("img")
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "<script" not in text and "onerror=alert(2)&gt;" in text and "{{ 7*7 }}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\u202e]", text)
    assert "␀␛[31m ⟨U+D800⟩ ⟨U+202E⟩ evil" in page.words
    assert LONG not in text and "more characters" in page.words
    assert len(page.all("style")) == 1 + sum(attrs.get("class") == "plot" for attrs in page.all("svg")), "the page's and its drawings'"
    assert not [a for a in page.all("a") if not (a["href"] or "").startswith("#")]


@pytest.mark.slow
def test_a_browser_runs_nothing_of_a_hostile_output(make_run) -> None:
    import shutil
    import subprocess

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here to open the page in")
    act = "document.title='taken';document.body.dataset.taken='yes'"

    def rewrite(item: dict) -> None:
        item["output"] = f'</pre></details><script>{act}</script><img src=x onerror="{act}"><svg onload="{act}"></svg>' + POISON

    run = make_run(n=24, rewrite=rewrite)
    report.write(run)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, (run / "report.html").as_uri()], capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert "word-problems-gift" in done.stdout and "Gained and lost items" in page.words
    assert page.all("body") == [{}] and "<title>taken" not in done.stdout
    assert not page.all("script") and not page.all("img")


def _strip(results: dict) -> None:
    for key in list(results):
        if key != "arms":
            del results[key]
    results["arms"] = {"gift": {}}


CHANGES = {
    "nothing at all": lambda results: results.clear(),
    "an empty arm only": _strip,
    "everything null": lambda results: results.update({key: None for key in results}),
    "arms null": lambda results: results["arms"].update({name: None for name in results["arms"]}),
    "parts of an arm null": lambda results: results["arms"].update({name: dict.fromkeys(arm) for name, arm in results["arms"].items()}),
    "failed arm": lambda results: results["arms"].update(gift={"status": "failed", "error": "non-finite loss at step 12, rows p-7, p-9"}),
    "no guidance": lambda results: results.update(guidance=None),
    "no histogram": lambda results: results["guidance"].pop("histogram"),
    "no instruct": lambda results: results["arms"].pop("instruct"),
    "no evaluation": lambda results: [
        arm.update(task={}, general={}, task_mean=None, general_mean=None) for arm in results["arms"].values()
    ],
    "no general": lambda results: [arm.update(general={}, general_mean=None) for arm in results["arms"].values()],
    "no task": lambda results: [arm.update(task={}, task_mean=None) for arm in results["arms"].values()],
    "no paired tests": lambda results: [
        part.pop("vs_instruct", 0) for arm in results["arms"].values() for group in ("task", "general") for part in arm[group].values()
    ],
    "no intervals": lambda results: [
        part.get("vs_instruct", {}).update(ci=None, p=None) for arm in results["arms"].values() for part in arm["task"].values()
    ],
    "not a number": lambda results: [
        part.update(score=float("nan"), ci=[float("nan"), 1]) for arm in results["arms"].values() for part in arm["task"].values()
    ],
    "general all lost": lambda results: results["arms"]["instruct"].update(general_mean=0.0),
    "no items": lambda results: [part.update(items="gone.jsonl") for arm in results["arms"].values() for part in arm["task"].values()],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_parts_missing_still_has_a_page(make_run, name: str) -> None:
    run = make_run(n=24, change=CHANGES[name])
    if name == "no items":
        for path in run.glob("arms/*/evaluation/task/*.jsonl"):
            path.write_text('{"id": "half a li', encoding="utf-8")
    page, _ = page_of(run)
    expected = {
        "nothing at all": "The results hold no arms.",
        "an empty arm only": "not evaluated: nothing can be said",
        "failed arm": "non-finite loss at step 12, rows p-7, p-9",
        "no guidance": "No teacher pass was part of this run.",
        "no histogram": "The guidance summary holds no histogram.",
        "no instruct": "Not drawn: it needs the instruct model",
        "no evaluation": "not evaluated: nothing can be said",
        "no general": "forgetting is unknown",
        "no task": "the gain is unknown",
        "no paired tests": "without a paired test against instruct",
        "no intervals": "no test available",
    }
    assert expected.get(name, "Verdict") in page.words
    assert not re.search(r"\bnan\b", page.words.lower())
    report.markdown(results_of(run)), report.csv_text(results_of(run))


def test_a_single_run_is_read_from_the_top_of_its_folder(make_run) -> None:
    def change(results: dict) -> None:
        for arm in results["arms"].values():
            arm["paths"] = {}
            for group in ("task", "general"):
                for result in arm[group].values():
                    result.pop("items")

    run = make_run(n=24, arms=("instruct", "gift"), kind="run", change=change)
    page, _ = page_of(run)
    assert "Loss curves" in page.words and "The answer is" in page.words
    assert "Not shown" not in page.words


def test_several_tasks_have_a_mean(make_run) -> None:
    page, _ = page_of(make_run(n=24, arms=("instruct", "gift"), tasks=("first", "second", "third", "fourth")))
    assert "task mean" in page.words and "mean of 4 tasks" in page.words


TEN = ("instruct", "sft", "graft", "gift", *(f"arm number {i}" for i in range(6)))


def _long_texts(item: dict) -> None:
    item["output"] = item["output"] + "<&'\"" * 1000
    item["prompt"] = "& " * 4000


def test_a_large_comparison_stays_small(make_run) -> None:
    from conftest import every_field

    run = make_run(n=40, arms=TEN, tasks=tuple(f"task number {i}" for i in range(10)), rewrite=_long_texts, change=every_field)
    with open(run / "arms" / "gift" / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": i, "loss": 1 / (i + 1)}) + "\n" for i in range(20_000))
    page, text = page_of(run)
    assert len(text.encode()) < 3_000_000
    assert "more characters" in page.words
    assert all(f"task number {i}" in page.words for i in range(10)) and all(name in page.words for name in TEN)


def test_a_page_that_would_be_too_large_shows_fewer_items(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    from guidetune.report import html

    run = make_run(n=60, arms=("instruct", "gift"))
    whole = page_of(run)[1]
    monkeypatch.setattr(html, "MAX_BYTES", len(whole.encode()) - 5_000)
    page, text = page_of(run)
    assert (
        5_000 <= len(whole.encode()) - len(text.encode()) <= 25_000 and "Gained and lost items" in page.words and "Provenance" in page.words
    )


@pytest.mark.slow
def test_ten_arms_ten_tasks_of_two_thousand_items_stay_small(make_run) -> None:
    from conftest import every_field

    run = make_run(n=2000, arms=TEN, tasks=tuple(f"task number {i}" for i in range(10)), change=every_field)
    page, text = page_of(run)
    assert len(text.encode()) < 3_000_000
    assert len([attrs for attrs in page.all("details") if attrs.get("class") == "item"]) > 200


def test_a_folder_without_results_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no results\.json"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(BadInput, match="holds a list"):
        report.write(tmp_path)
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match="cannot read"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()


def _colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def _contrast(one: str, two: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(
            w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True)
        )

    low, high = sorted([light(one), light(two)])
    return (high + 0.05) / (low + 0.05)


def test_text_and_plot_colours_have_contrast_in_both_themes() -> None:
    style = (Path(plots.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    light = _colours(style[: style.index("@media")])
    dark = light | _colours(style[style.index("@media") : style.index("* { box-sizing")])
    assert dark["paper"] != light["paper"]
    for theme in (light, dark):
        for name, colour in theme.items():
            if name in ("ink", "muted", "link", "up", "down", "bad") or name.startswith("arm-"):
                for ground in ("paper", "raised"):
                    assert _contrast(colour, theme[ground]) >= 4.5, (name, colour, ground)
        weights = [name for name in theme if re.fullmatch(r"w\d", name)]
        assert len(weights) == heatmap.LEVELS
        for name in weights:  # the number stands on the colour of its weight
            assert _contrast(theme["ink"], theme[name]) >= 4.5, name
    assert {name for name in light if name.startswith("arm-")} == {f"arm-{i}" for i in range(len(plots.ARM_COLOURS))}
    for colour in plots.ARM_COLOURS:  # a drawing copied out of the page, on white or on black
        assert _contrast(colour, "#ffffff") >= 3 and _contrast(colour, "#000000") >= 3, colour


def test_clean_writes_out_what_cannot_be_seen() -> None:
    assert clean("a\x00\x1b\x7f\x85\u200b\u202e\ud800\ufeffb\r\nc\td\r") == "a␀␛␡⟨U+0085⟩⟨U+200B⟩⟨U+202E⟩⟨U+D800⟩⟨U+FEFF⟩b\nc\td␍"
    assert clean("naïve 日本 👩\u200d🔬 עברית") == "naïve 日本 👩\u200d🔬 עברית"


def test_names_in_a_crowd_do_not_cover_each_other() -> None:
    import random

    from guidetune.report.figure import place_labels

    rng = random.Random(1)
    anchors = [(200 + rng.gauss(0, 25), 150 + rng.gauss(0, 15)) for _ in range(12)]
    widths = [rng.uniform(20, 90) for _ in anchors]
    things = [(x - 5, y - 5, x + 5, y + 5) for x, y in anchors]
    frame = (0.0, 0.0, 480.0, 300.0)
    corners = place_labels(anchors, widths, 10, things, frame)
    boxes = [(x, y, x + wide, y + 10) for (x, y), wide in zip(corners, widths, strict=True)]
    for i, one in enumerate(boxes):
        assert one[0] >= 0 and one[1] >= 0 and one[2] <= 480 and one[3] <= 300
        for two in boxes[:i]:
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]


def test_the_frontier_is_what_nobody_beats() -> None:
    from guidetune.report.findings import frontier

    points = {
        "instruct": (1.0, 0.0),
        "sft": (0.5, 0.3),
        "graft": (0.5, 0.1),
        "gift": (0.9, 0.2),
        "same as gift": (0.9, 0.2),
        "low": (0.8, 0.2),
    }
    assert frontier(points) == ["sft", "gift", "same as gift", "instruct"]
    assert frontier({"a": (1.0, 1.0), "b": (0.9, 0.9)}) == ["a"]


def test_the_ledger_counts_rows_that_operations_made() -> None:
    from guidetune.report import sections

    ledger = {
        "read": 10, "made": 4, "used": 11, "dropped": {"not drawn": 3}, "sources": {},
        "operations": [{"method": "mix", "in": 10, "made": 4, "dropped": {"not drawn": 3}, "out": 11}],
    }  # fmt: skip
    part = sections._ledger(Path(), {"ledger": ledger})
    assert part is not None and part["unaccounted"] == 0 and part["total"]["made"] == 4
    assert part["operations"] == [{"name": "mix", "in": 10, "made": 4, "out": 11, "dropped": 3}]
    assert sections._ledger(Path(), {"ledger": {**ledger, "made": 3}})["unaccounted"] == -1  # type: ignore[index]
