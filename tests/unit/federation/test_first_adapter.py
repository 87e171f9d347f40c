"""The adapter that preferences are measured against, at a client that only knows its hash."""

import pytest
import torch

from silotune.core.errors import Declined, UpdateError
from silotune.core.lora import at_rank
from silotune.core.tree import sha256
from silotune.core.types import Broadcast
from silotune.federation.first_adapter import (
    FILE,
    check_first_adapter,
    find_start,
    needs_start,
    own_start,
)
from silotune.recipes.schema import RunConfig

FIRST = {"m.lora_A.weight": torch.arange(12.0).reshape(4, 3), "m.lora_B.weight": torch.ones(5, 4)}
LATER = {name: tensor + 1 for name, tensor in FIRST.items()}
CORE = "m.lora_core.weight"
TOLD = f"sha256:{sha256(FIRST)}"


def run_of(task="prefer", start=TOLD):
    adapter = {"rank": 4, "start": start}
    return RunConfig.model_validate(
        {"rounds": 3, "task": task, "adapter": adapter, "data": {"path": "x"}}
    )


def found(broadcast, folder, run=None):
    return sha256(find_start(run or run_of(), "north", broadcast, folder))


def test_only_preferences_need_it_and_only_where_it_is_told_by_its_hash():
    assert needs_start(run_of())
    assert not needs_start(run_of("instruct"))
    assert not needs_start(run_of(start=None))
    assert not needs_start(run_of(start="runs/before"))


def test_the_adapter_of_the_first_round_is_kept_for_later_ones(tmp_path):
    wanted = sha256(FIRST)
    assert found(Broadcast(1, FIRST), tmp_path / "new") == wanted
    assert found(Broadcast(5, LATER), tmp_path / "new") == wanted
    assert (tmp_path / "new" / FILE).stat().st_mode & 0o077 == 0


def test_a_late_newcomer_takes_the_one_that_is_sent_along(tmp_path):
    assert found(Broadcast(5, LATER, start=FIRST), tmp_path) == sha256(FIRST)
    assert found(Broadcast(6, LATER), tmp_path) == sha256(FIRST)


def test_without_it_the_error_says_what_happens_next(tmp_path):
    with pytest.raises(UpdateError, match=r"round 5: .*measured against") as caught:
        found(Broadcast(5, LATER), tmp_path)
    assert "the server sends it with the next message" in str(caught.value)


@pytest.mark.parametrize("what", ["damaged", "another"])
def test_a_kept_file_is_checked(tmp_path, what):
    found(Broadcast(1, FIRST), tmp_path)
    path = tmp_path / FILE
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        other = run_of(start=f"sha256:{sha256(LATER)}")
        find_start(other, "north", Broadcast(1, LATER), tmp_path)
    with pytest.raises(UpdateError, match="is not here"):
        found(Broadcast(5, LATER), tmp_path)


def test_another_adapter_than_the_recipe_names_is_refused(tmp_path):
    for sent, what in (
        (Broadcast(1, LATER), "the first adapter"),
        (Broadcast(5, LATER, start=LATER), "the adapter to start from"),
    ):
        with pytest.raises(Declined, match=f"{what} has the SHA-256"):
            found(sent, tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_client_of_a_lower_rank_is_measured_against_the_whole_start(tmp_path):
    run = run_of()
    low = own_start(run.adapter, run.adapter.at_rank(2))
    here = run.model_copy(update={"adapter": low})
    part = at_rank(FIRST, 2)
    check_first_adapter(here, "north", Broadcast(1, part))
    with pytest.raises(UpdateError, match="is not here"):
        found(Broadcast(1, part), tmp_path, here)
    assert found(Broadcast(1, part, start=FIRST), tmp_path, here) == sha256(FIRST)
    with pytest.raises(Declined):
        found(Broadcast(1, part, start=part), tmp_path, here)


def test_cores_that_change_nothing_belong_to_the_algorithm_and_others_are_refused(tmp_path):
    new = {**FIRST, CORE: torch.eye(4)}
    check_first_adapter(run_of(), "north", Broadcast(1, new))
    assert found(Broadcast(1, new), tmp_path) == sha256(FIRST)
    with pytest.raises(Declined, match="the first adapter"):
        check_first_adapter(run_of(), "north", Broadcast(1, {**FIRST, CORE: 2 * torch.eye(4)}))
