"""The measured memory of a run that trains clients together is that of a whole group."""

import pytest

import silotune
from silotune.federation.client import Worker
from silotune.federation.recipe_model import load_for
from silotune.recipes.parse import parse
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.inprocess import prepare_clients
from silotune.training.tasks import build_task
from silotune.workflows.plan import measure
from tests.conftest import changed, hospital_rows, small_table, write_jsonl


@pytest.mark.parametrize(
    ("changes", "size", "most"),
    [
        ({"together": 2}, 2, None),
        ({"together": 9}, 4, None),  # a group is not larger than the cohort
        ({"together": "auto"}, 2, 256),
        ({"together": 1}, None, None),
    ],
)
def test_the_widest_batch_is_taken_by_a_whole_group(
    tiny_model, tmp_path, monkeypatch, changes, size, most
):
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows(num_clients=4))
    table = changed(small_table(tiny_model, data), {f"runtime__{k}": v for k, v in changes.items()})
    if most is not None:
        table["sampling"] = {"num_clients": 3}
    run = parse(table)
    loaded = load_for(run)
    worker = Worker(loaded, build_task(run.task), run, algorithm_of(run.algorithm))
    clients = prepare_clients(silotune.check(run).rows, worker)
    seen, real = [], measure.train_together

    def spy(loaded, group, *given, most_tokens, **more):
        seen.append((len(group), most_tokens))
        return real(loaded, group, *given, most_tokens=most_tokens, **more)

    monkeypatch.setattr(measure, "train_together", spy)
    probe = measure._Probe(worker, clients)
    probe.step_together(clients["hospital-0"].examples[:2])
    assert seen == ([] if size is None else [(size, most)])
