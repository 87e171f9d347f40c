"""What commands print about finished work: a run, a comparison, a sweep, an audit, scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.cli.frame import print_line
from silotune.cli.tables import print_table
from silotune.core.wording import counted, human_bytes

if TYPE_CHECKING:
    import silotune
    from silotune.deployment.doctor import Finding
    from silotune.workflows.audit.audit import Audit
    from silotune.workflows.check import Checked


def print_checked(checked: "Checked") -> None:
    """Print every client's numbers of rows, the privacy guarantee, and warnings."""
    from silotune.federation.privacy_statement import check_lines

    parts = {"train rows": "train", "validation rows": "validation", "held-out rows": "evaluation"}
    if not any(own.validation for own in checked.rows.values()):
        del parts["validation rows"]
    body = [
        (name, *(str(len(getattr(own, part))) for part in parts.values()))
        for name, own in checked.rows.items()
    ]
    if body:
        print_table([("client", *parts), *body])
    for text in check_lines(checked.promise) if checked.promise is not None else ():
        print_line(text)
    if checked.chosen:
        print_line(checked.chosen)
    for text in checked.warnings:
        print_line(f"warning: {text}")
    for text in checked.unchecked:
        print_line(f"not checked: {text}")
    print_line("no mistakes found in everything else" if checked.unchecked else "no mistakes found")
    print_line(checked.not_looked_at)


def print_run(done: "silotune.Run") -> None:
    """Print a run's held-out scores, what it cost, and where its files are."""
    from silotune.results import budget_texts, run_tables
    from silotune.results import summary as tables
    from silotune.results.conflict import conflict_lines

    summary = done.summary
    if tables.is_scored(summary):
        name, unit = tables.loss_name(summary), tables.unit_of(summary)
        print_line(f"\n{name} ({unit}, lower is better)\n")
    else:
        print_line("\nrows (held-out loss was not measured)\n")
    print_table(tables.loss_table(summary))
    if labels := tables.label_table(summary):
        what = "pairs" if summary["task"] == "prefer" else "labels"
        print_line(f"\n{summary.get('scored', 'held-out')} {what} (higher is better)\n")
        print_table(labels)
    for text in tables.server_lines(summary):
        print_line(f"\n{text}")
    if own := tables.own_table(summary):
        print_line(f"\nafter each client's own steps ({tables.unit_of(summary)})\n")
        print_table(own)
    if lost := tables.worse_off(summary):
        print_line(f"\nnot better than the base for: {', '.join(lost)}")
    for text in (*conflict_lines(summary), *budget_texts.budget_warnings(summary)):
        print_line(f"\n{text}")
    print_line()
    for text in [
        *tables.notes_of(done.config),
        *tables.unused_rows(done.config, summary, done.split),
        *budget_texts.budget_lines(summary),
        *tables.cost_lines(summary),
        *tables.own_lines(summary),
    ]:
        print_line(text)
    if "privacy" in summary:
        from silotune.federation.privacy_statement import privacy_lines

        print_line(f"privacy: {privacy_lines(summary['privacy'])[0]}")
    if predicted := run_tables.prediction_table(summary):
        print_line()
        print_table(predicted)
        for note in run_tables.prediction_notes(summary):
            print_line(f"note: {note}")
        print_line()
    print_line(f"adapter: {done.path / 'adapter'}")
    if done.config.report.page:
        print_line(f"report: {done.path / 'report.html'}")


def print_answers(done: "silotune.Run") -> None:
    """Print one held-out question with the answers of base and result."""
    for sample in done.samples[:1]:
        print_line(f"\nquestion   {sample['question']}")
        for arm, text in sample["answers"].items():
            print_line(f"{arm:<10} {text}")
    print_line(f'\nask it yourself: silotune ask {done.path} "your question"')


def print_comparison(done: "silotune.Comparison") -> None:
    """Print a comparison's tables, one set per metric, then costs and verdicts."""
    from silotune.workflows.compare import statistics as tables
    from silotune.workflows.compare.best import choice_tables
    from silotune.workflows.compare.verdicts import (
        best_verdict,
        comparison_verdict,
        tuning_line,
        worse_off_warnings,
    )

    result = done.result
    for metric in result["metrics"].values():
        better = "lower" if metric["lower_is_better"] else "higher"
        print_line(f"\n{metric['label']} ({metric['unit']}, {better} is better)\n")
        print_table(tables.score_table(result, metric["key"]))
        print_line(
            f"\ndifference from training alone, with 95 % intervals. {tuning_line(result)}\n"
        )
        print_table(tables.difference_table(result, metric["key"]))
        if against := tables.against_table(result, metric["key"]):
            print_line(f"\n{tables.AGAINST[0].lower()}{tables.AGAINST[1:]}\n")
            print_table(against)
        for title, table in choice_tables(result, metric["key"]):
            print_line(f"\n{title[0].lower()}{title[1:]}\n")
            print_table(table)
    print_line(f"\ncost, over {counted(len(result['seeds']), 'seed')}\n")
    print_table(tables.cost_table(result))
    print_line()
    for text in [
        *comparison_verdict(result),
        *best_verdict(result),
        *worse_off_warnings(result),
        *result["notes"],
    ]:
        print_line(text)
    print_line(f"report: {done.path / 'report.html'}")


def print_contribution(done: "silotune.Contribution") -> None:
    """Print what each client's updates did for the others, and where every row's numbers are."""
    from silotune.workflows.contribution.measured import contribution_lines, contribution_table

    found = done.result
    print_table(contribution_table(found))
    print_line()
    for text in contribution_lines(found):
        print_line(text)
    print_line(f"all rows: {done.path}")


def print_sweep(done: "silotune.Sweep") -> None:
    """Print a sweep's runs, best first, and which of them failed and why."""
    from silotune.workflows.sweep.ranking import sweep_table, verdict

    result = done.result
    print_line()
    print_table(sweep_table(result))
    print_line(f"\n{verdict(result)}")
    for run in result["runs"]:
        if run["failed"] is not None:
            print_line(f"run {run['number']:03d} failed: {run['failed']}")
    for note in result["notes"]:
        print_line(f"note: {note}")
    print_line(f"runs: {done.path / 'runs'}")
    if (done.path / "report.html").is_file():
        print_line(f"report: {done.path / 'report.html'}")


def print_scores(done: "silotune.Evaluation", task: str) -> None:
    """Print the scores of suites if any was asked, otherwise those of the held-out rows."""
    from silotune.workflows.evaluate import tables

    scores = done.scores
    if scores["settings"]["suites"]:
        print_table(tables.suite_table(scores))
        for text in tables.lm_eval_lines(scores):
            print_line(text)
    elif task == "classify":
        print_table(tables.label_table(scores))
    elif task == "prefer":
        print_table(tables.pair_table(scores))
    else:
        print_table(tables.quality_table(scores))
    print_line(f"all {'numbers' if task in ('text', 'prefer') else 'answers'}: {done.path}")


def print_audit(found: "Audit") -> None:
    """Print what an attack showed, and whether the claim is refuted."""
    from silotune.workflows.audit.membership import membership_table
    from silotune.workflows.audit.result import audit_lines

    if "clients" in found.result:
        print_table(membership_table(found.result))
    for text in audit_lines(found.result):
        print_line(text)
    print_line(f"all numbers: {found.path}")


def print_privacy(found: Mapping[str, Any] | None) -> None:
    """Print a privacy statement line by line."""
    from silotune.federation.privacy_statement import privacy_lines

    if found is None:
        print_line("no differential privacy: the recipe has no [privacy] with a unit")
        return
    for text in privacy_lines(found):
        print_line(text)


def print_teacher(place: Path, record: Mapping[str, Any], recipe: str) -> None:
    """Print a teacher's held-out scores, and how to use it."""
    scores = {key: value for key, value in record["held_out"].items() if isinstance(value, float)}
    print_line("held out: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
    print_line(f"teacher: {place}")
    print_line(f"use it: silotune run {recipe} distill.teacher={place}")


def print_status(now: dict[str, Any]) -> None:
    """Print a consortium's clients and runs."""
    from silotune.deployment.status import status_tables

    print_line(f"{now['name']}: {'up' if now['up'] else 'not up'}")
    print_line(f"fingerprint: {now['fingerprint']}")
    for table in status_tables(now):
        print_table(table)


def print_finding(finding: "Finding") -> None:
    """Print one check of a client's machine, with its fix below."""
    print_line(f"{finding.verdict:<5} {finding.what:<9} {finding.text}")
    if finding.fix:
        print_line(f"{'':<16}{finding.fix}")


def print_outbound(path: Path) -> None:
    """Print what has left a client's machine, one line per run."""
    from silotune.federation.outbound_log import sent_by_run

    body = [
        (
            own["run"][:8],
            own["first"],
            own["last"],
            str(own["answers"]),
            str(own["updates"]),
            "-" if own["bytes_of_updates"] is None else human_bytes(own["bytes_of_updates"]),
            human_bytes(own["bytes"]),
        )
        for own in sent_by_run(path)
    ]
    header = ("run", "first", "last", "answers", "updates", "in updates", "in all answers")
    print_table([header, *body])
