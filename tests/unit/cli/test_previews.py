"""What `silotune data` and `silotune plan` print: nouns and verbs agree with their numbers."""

from dataclasses import replace

import pytest

from silotune.cli.previews import print_plan, print_preview
from silotune.data.duplicates import Duplicates
from silotune.recipes.schema import RunConfig
from silotune.training.loop import TrainConfig
from silotune.workflows.plan.fit import Change, Limits, Prediction
from silotune.workflows.plan.memory import BatchShape, ServerMemory
from silotune.workflows.plan.plan import Plan
from silotune.workflows.plan.times import Times
from silotune.workflows.plan.traffic import Traffic
from silotune.workflows.preview import ClientPreview, Lengths, Preview


def preview_of(count: int) -> Preview:
    """One client; every kind of duplicate occurs `count` times."""
    lengths = Lengths({"p50": 5, "p95": 9, "max": 9}, num_cut=0, num_dropped=0, trained_share=0.5)
    kinds = Duplicates(*[count] * 6)
    client = ClientPreview(8, 2, {}, train=lengths, held_out=lengths, duplicates=kinds)
    run = RunConfig.model_construct(train=TrainConfig(max_length=16))
    return Preview(run, "one client", {"north": client}, count, ("look here",), ())


@pytest.mark.parametrize(
    ("count", "server", "said"),
    [
        (
            1,
            "1 row at the server",
            [
                "train row repeats an earlier one of the same client",
                "train row is also a train row elsewhere",
                "train row has a question that another train row answers differently",
                "held-out row is also a train row",
                "of these is a train row of the same client",
                "held-out row has a question that a train row answers differently",
            ],
        ),
        (
            2,
            "2 rows at the server",
            [
                "train rows repeat an earlier one of the same client",
                "train rows are also train rows elsewhere",
                "train rows have a question that another train row answers differently",
                "held-out rows are also train rows",
                "of these are train rows of the same client",
                "held-out rows have a question that a train row answers differently",
            ],
        ),
    ],
)
def test_a_preview_counts_in_whole_sentences(capsys, count, server, said):
    print_preview(preview_of(count))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"1 client: one client; {server}"
    first = lines.index("duplicates") + 2
    assert lines[first : first + 6] == [f"{count:>5} {text} (north {count})" for text in said]
    assert lines[-2:] == ["warning: look here", "no mistakes found"]


@pytest.mark.parametrize("num", [40, 41, 1000])
def test_a_preview_of_many_clients_lists_those_with_the_most_and_the_fewest_rows(capsys, num):
    found = preview_of(1)
    clients = {
        f"client-{n:04}": replace(found.clients["north"], num_train=n + 1) for n in range(num)
    }
    print_preview(replace(found, clients=clients))
    out = capsys.readouterr().out
    shown = [name for name in clients if name in out.partition("duplicates")[0]]
    assert len(shown) == 40
    assert shown == [*clients][:20] + [*clients][-20:]
    assert ("40 of them are listed" in out) == (num > 40)


def plan_of(num: int) -> Plan:
    """A plan of `num` rounds and clients, and of batches of `num` rows."""
    return Plan(
        run=RunConfig.model_construct(),
        traffic=Traffic(
            down=10,
            news=10,
            up=20,
            head_down=0,
            head_up=0,
            kept=0,
            num_values=1152,
            num_clients=num,
            num_asked=num,
            rounds=num,
            per_round=30 * num,
            training=30,
            scoring=0,
            bytes_down=10,
            bytes_up=20,
            tracker_mib=0.5,
        ),
        client=None,
        server=ServerMemory(base=10, state=10, combining=10, process=10),
        batch=BatchShape(num_rows=num, length=128, num_trained=20),
        measured=None,
        times=Times(start=1, client=1, round=1, training=1, score=1, scoring=1),
        limits=Limits(),
        changes=(),
        fits=None,
        notes=("nothing was measured",),
    )


@pytest.mark.parametrize(("num", "s"), [(1, ""), (3, "s")])
def test_a_plan_counts_in_whole_sentences(capsys, num, s):
    print_plan(plan_of(num))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"first round, {num} of {num} client{s} {30 * num} {30 * num} B" in lines
    assert f"{num} round{s} of training 30 30 B" in lines
    assert f"memory, estimated for {num} row{s} of 128 tokens, 20 of them learned" in lines
    assert f"{num} round{s} of training 1 s" in lines
    assert lines[-1] == "note: nothing was measured"


def test_a_plan_says_whether_the_run_fits_and_what_would(capsys):
    change = Change({"adapter.rank": 1, "model.gradient_checkpointing": True}, Prediction(1, 2, 3))
    for fits, changes, said in [
        (True, (), "it fits"),
        (False, (), "it does not fit, and none of the changes that were tried makes it fit"),
        (
            False,
            (change,),
            "it does not fit; each of these changes would make it fit, cheapest first",
        ),
    ]:
        print_plan(replace(plan_of(3), fits=fits, changes=changes))
        lines = capsys.readouterr().out.splitlines()
        assert said in lines
    assert any("adapter.rank=1 model.gradient_checkpointing=true  " in line for line in lines)
