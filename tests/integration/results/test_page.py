"""A page is self-contained, escapes all data, and starts with what matters."""

import re
from html.parser import HTMLParser

import pytest

from silotune.recipes.parse import parse
from silotune.results.page import run_page
from silotune.results.verdicts import interval, run_verdict
from silotune.workflows.compare.page import comparison_page
from silotune.workflows.compare.verdicts import comparison_verdict
from tests.unit.results.page_values import (
    ARMS,
    HOSTILE,
    comparison_of,
    provenance,
    recipe,
    rows_of,
    samples_of,
    split_of,
    summary_of,
)

NAMES = ("north", "south", "west")
FILES = ("metrics.jsonl", "summary.json", "comparison.json")
"""Beside the page."""
PLAIN_TAGS = (
    *("html", "head", "meta", "title", "style", "body", "main", "header", "nav", "section"),
    *("article", "h1", "h2", "h3", "h4", "p", "div", "ul", "li", "a", "b", "strong", "pre"),
    *("code", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "details"),
    *("summary", "svg", "g", "path", "defs", "use", "text", "rect", "pattern", "clippath"),
)


def page_of_run(names=NAMES, **changes):
    """The page of a run; without split and answers unless given, for speed."""
    made = {"summary": summary_of(names), "rows": rows_of(names), "split": {}, "samples": []}
    given = made | changes
    split, samples = given["split"], given["samples"]
    return run_page(
        recipe(), given["summary"], given["rows"], provenance(), split=split, samples=samples
    )


def page_of_comparison(names=NAMES, *, comparison=None, split=None, samples=()):
    shown = comparison or comparison_of(names)
    return comparison_page(
        shown, run=recipe(), provenance=provenance(), split=split or {}, samples=samples
    )


class Reader(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture(scope="module")
def run_reader():
    split, samples = split_of(HOSTILE, num_labels=3), samples_of(HOSTILE)
    return Reader(page_of_run(HOSTILE, split=split, samples=samples))


@pytest.fixture(scope="module")
def comparison_reader():
    split, samples = split_of(HOSTILE), samples_of(HOSTILE)
    return Reader(page_of_comparison(HOSTILE, split=split, samples=samples))


@pytest.fixture(params=["run_reader", "comparison_reader"])
def reader(request):
    return request.getfixturevalue(request.param)


def test_names_and_answers_of_clients_bring_no_tag_and_no_handler(reader):
    assert set(reader.tags) <= set(PLAIN_TAGS)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    for name in HOSTILE:
        assert " ".join(name.split()) in reader.text


def test_a_page_asks_for_nothing_outside_itself(reader):
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in reader.attributes
    for name, value in reader.attributes:
        assert name != "src"
        assert name not in ("href", "xlink:href") or value.startswith("#") or value in FILES
    assert "@import" not in reader.text
    assert not re.search(r"url\((?!#)", " ".join(value for _, value in reader.attributes))


def test_every_link_of_the_page_has_its_place(reader):
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [v for name, v in reader.attributes if name == "href" and v not in FILES]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_run_verdict_counts_clients_and_names_the_change():
    assert run_verdict(summary_of(NAMES, worse=["west"])) == (
        "2 of 3 clients have a lower held-out loss than with the base; overall, weighted by "
        "tokens, it fell from 2.500 to 2.300 nats per token (−8.0\u00a0%)."
    )


def test_run_verdict_says_when_loss_rose_stayed_or_is_unknown():
    summary = summary_of(["a"])
    summary["overall"]["federated_loss"] = 2.75
    assert "1 of 1 client has" in run_verdict(summary)
    assert "it rose from 2.500 to 2.750 nats per token (+10.0\u00a0%)" in run_verdict(summary)
    summary["overall"]["federated_loss"] = 2.5
    assert "it stayed at 2.500" in run_verdict(summary)
    summary["overall"]["federated_loss"] = None
    assert "was not measured" in run_verdict(summary)


def test_run_verdict_counts_clients_without_a_score():
    summary = summary_of(NAMES)
    summary["clients"]["west"]["federated_loss"] = None
    assert "2 of 2 clients have" in run_verdict(summary)
    assert "No held-out score for 1 client." in run_verdict(summary)


def test_clients_that_are_not_better_than_the_base_are_named_in_a_warning():
    page = Reader(page_of_run(rows=[], summary=summary_of(NAMES, worse=["west", "south"])))
    assert "Not better than the base for: south, west." in page.text
    assert "Not better" not in Reader(page_of_run(rows=[])).text


def test_run_page_holds_result_cost_use_recipe_and_hashes(run_reader):
    for part in (
        "sent to clients 2.4 MB, sent by clients 1.8 MB",
        'silotune ask runs/one "your question"',
        "PeftModel.from_pretrained",
        "adapter/ is a PEFT folder:",
        'path = "medquad_mini"',
        "59" * 32,
        "c2" * 32,
        "2f" * 32,
        "2.13.0",
    ):
        assert part in run_reader.text
    assert "```" not in run_reader.text


def test_run_page_begins_with_the_verdict(run_reader):
    text = run_reader.text
    assert (
        text.index("have a lower held-out loss") < text.index("Results") < text.index("train rows")
    )


def test_answers_stand_side_by_side_with_the_reference_last(run_reader):
    text = run_reader.text[run_reader.text.index("Answers side by side") :]
    places = [text.index(word) for word in ("base x", "federated An answer.", "reference </pre>")]
    assert places == sorted(places)


def test_run_page_without_scores_split_and_samples_leaves_these_parts_out():
    summary = summary_of(NAMES)
    for losses in (*summary["clients"].values(), summary["overall"]):
        losses.update(base_loss=None, federated_loss=None)
    rows = [row for row in rows_of(NAMES) if row["event"] != "evaluate"]
    page = Reader(page_of_run(summary=summary, rows=rows))
    assert "was not measured" in page.text
    assert "Answers" not in page.text
    assert "Who holds what" not in page.text
    assert page.tags.count("svg") == 3  # training loss, bytes, seconds


def test_run_page_leaves_out_numbers_that_clients_kept_to_themselves():
    summary = {**summary_of(NAMES), "tokens_trained": None, "peak_memory_bytes": None}
    for losses in (*summary["clients"].values(), summary["overall"]):
        losses.update(base_loss=None, federated_loss=None)
    kept = ("train_loss", "num_tokens")
    rows = [
        {key: value for key, value in row.items() if key not in kept}
        for row in rows_of(NAMES)
        if row["event"] != "evaluate"
    ]
    page = Reader(page_of_run(summary=summary, rows=rows))
    assert page.tags.count("svg") == 2  # bytes, seconds
    for absent in (
        "tokens trained",
        "peak memory",
        "None",
        "0.000",
        "Held-out loss (",
        "lower is better",
    ):
        assert absent not in page.text
    words = " ".join(page.text.split())
    assert "client train rows held-out rows" in words
    assert "held-out rows base" not in words, "columns of dashes"
    assert "base loaded 1 time " in page.text


def test_rows_that_failed_or_diverged_leave_gaps_and_no_error():
    nan = {"event": "evaluate", "round": 1, "client": "north", "status": "ok", "num_tokens": 5}
    lost = {"event": "train", "round": 2, "client": "west", "status": "late", "place": "too late"}
    rows = [*rows_of(NAMES), {**nan, "loss": float("nan")}, lost]
    assert "nan" not in "".join(re.findall(r'd="[^"]*"', page_of_run(rows=rows)))


def test_full_training_is_used_without_peft():
    full = parse({"rounds": 3, "data": {"path": "medquad_mini"}, "adapter": {"kind": "full"}})
    page = run_page(full, summary_of(NAMES), [], provenance(), split={}, samples=[])
    assert "AutoModelForCausalLM.from_pretrained" in page
    assert "PeftModel" not in page


def test_comparison_verdict_states_the_mean_and_counts_clients():
    loss, rouge = comparison_verdict(comparison_of(NAMES))
    assert loss == (
        "With “federated” instead of training alone, the mean over clients gained: held-out loss "
        "−0.100 [−0.210,\u00a0−0.030] nats per token. "
        "Of 3 clients, 1 gained, 1 lost, 1 with no clear difference."
    )
    assert "ROUGE-L" in rouge


def test_comparison_names_clients_worse_off_than_alone_the_result_first():
    text = Reader(page_of_comparison()).text
    own = text.index(
        "With “federated”, a higher mean loss than alone: west (none of them clearly)."
    )
    other = text.index("With “federated: fedprox”, a higher mean loss than alone: north (")
    assert own < other


def test_comparison_tells_each_client_its_gain_or_loss():
    text = Reader(page_of_comparison()).text
    assert "north gained: held-out loss −0.100 [−0.210, −0.030] nats per token" in text
    assert "south lost: held-out loss" in text
    assert "west shows no clear difference: held-out loss" in text


def test_comparison_holds_every_arm_its_cost_and_the_notes(comparison_reader):
    for part in (
        "3 seeds; a verdict from fewer than 5 is weak evidence",
        "seeds 17, 18, 19",
        "120\u202f000",
        "1 min 20 s",
        "1.8 MB",
        "▲ gained",
        "▼ lost",
        "lower is better",
        "higher is better",
        "Left of zero is worse",
    ):
        assert " ".join(part.split()) in comparison_reader.text


def test_arm_without_a_score_at_a_client_is_a_dash():
    comparison = comparison_of(NAMES)
    north = comparison["clients"]["north"]
    north["scores"]["loss"].pop("only A")
    for part in ("scores", "differences", "verdicts"):
        north[part].pop("rougeL")
    text = Reader(page_of_comparison(comparison=comparison)).text
    assert "only A – –" in text
    assert "north gained: held-out loss" in text
    assert "has no verdict: ROUGE-L" in text


def test_charts_leave_out_what_would_hide_the_rest_and_the_table_keeps_it():
    arms = (*ARMS[:5], *(f"only {name}" for name in "abcdefg"))
    page = page_of_comparison(comparison=comparison_of(NAMES, arms=arms))
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    every, apart = drawings[:2]
    assert ">base<" in every
    assert ">base<" not in apart, "its distance would squeeze all other arms"
    assert not any("only" in drawing for drawing in drawings)
    assert "Adapters of single clients are shown only in the table." in page
    assert Reader(page).text.count("only a") == 2 * (len(NAMES) + 1)


def test_a_client_named_like_the_mean_does_not_replace_it():
    names = ("mean over clients", "south")
    comparison = comparison_of(names)
    comparison["overall"]["scores"]["loss"]["base"] = {"mean": 7.0, "low": 6.0, "high": 8.0}
    assert "7.000" in page_of_comparison(names, comparison=comparison)


def test_with_many_clients_charts_show_the_biggest_and_say_so():
    names = [f"client-{i:02d}" for i in range(31)]
    text = Reader(page_of_run(names, split=split_of(names))).text
    assert "The 30 clients with the most rows, of 31." in text


def test_the_page_of_a_run_is_the_same_each_time():
    assert page_of_run() == page_of_run()


def test_interval_without_bounds_or_numbers():
    assert interval({"mean": 2.0, "low": None, "high": None}, ".3f") == "2.000"
    assert interval({"mean": float("nan")}, ".3f") == "–"
    assert interval(None, ".3f") == "–"
    assert interval({"mean": -0.1, "low": -0.2, "high": 0.1}, "+.2f") == "−0.10 [−0.20,\u00a0+0.10]"


HEAD = 'colspan="4">'


def test_a_comparison_begins_with_its_figures_and_arms_and_folds_twenty_sentences():
    page = page_of_comparison([f"client {n:02d}" for n in range(20)])
    chart, mean, client, words = (
        page.index(part)
        for part in ("<svg", HEAD + "mean over", HEAD + "client 00", "<li><strong>client 00")
    )
    assert chart < mean < client < words
    folded = [part.split("</details>")[0] for part in page.split("<details>")[1:]]
    assert sum("<li><strong>client" in part for part in folded) == 1
    assert "<svg" not in "".join(folded)
    assert "mean over clients</th>" not in "".join(folded)


def test_a_page_says_which_recipe_when_and_where_the_numbers_are():
    made = {**provenance(), "recipe": "hospitals", "date": "2026-01-31"}
    page = run_page(recipe(), summary_of(NAMES), [], made, split={}, samples=[])
    assert "Recipe hospitals, 31 January 2026." in Reader(page).text
    assert '<a href="metrics.jsonl">' in page
    assert "Recipe hospitals" not in page_of_run()  # a folder of an earlier version
    assert '<a href="comparison.json">' in page_of_comparison()


def test_an_answer_that_was_cut_is_marked_and_no_other():
    (sample,) = samples_of(["north"])
    cut = Reader(page_of_run(samples=[{**sample, "cut": ["base"]}]))
    assert cut.text.count("cut at the maximum length") == 1
    assert cut.text.index("xxx") < cut.text.index("cut at the") < cut.text.index("An answer.")
    assert "cut at the" not in Reader(page_of_run(samples=[sample])).text
