"""Work on every node: each block goes to one node, counts add up, and a failure has its node's name."""

import json
import os
import time
from pathlib import Path

import torch.distributed as dist
from helpers.ranks import run_ranks

from megavar import cli
from megavar.ranks import NodeFailure, RankZeroError, Tally, claimed, leads_node, on_every_node
from megavar.stages import runner

NUM_NODES, RANKS_A_NODE = 3, 2


def join_node() -> int:
    """As torchrun's agents of three nodes would have started this rank."""
    rank = int(os.environ["RANK"])
    os.environ |= {"GROUP_RANK": str(rank // RANKS_A_NODE), "LOCAL_RANK": str(rank % RANKS_A_NODE)}
    os.environ |= {"GROUP_WORLD_SIZE": str(NUM_NODES), "LOCAL_WORLD_SIZE": str(RANKS_A_NODE)}
    dist.init_process_group("gloo")
    return rank // RANKS_A_NODE


def share_blocks(folder: str) -> None:
    node = join_node()
    taken, tally = [], Tally("numbers")
    assert leads_node() == (os.environ["LOCAL_RANK"] == "0")

    def work() -> None:
        for block in claimed(range(40), "blocks"):
            taken.append(block)
            tally.add(block)
            time.sleep(0.02 if node else 0.2)  # a slow node claims fewer
        time.sleep(1.1)
        tally.add(0)

    on_every_node(work)
    time.sleep(1.1)
    result = {"node": node, "taken": taken, "sum": tally.add(0)}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def test_each_block_falls_to_one_node_and_counts_add_up(tmp_path):
    run_ranks(NUM_NODES * RANKS_A_NODE, share_blocks, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(NUM_NODES * RANKS_A_NODE)]
    assert [row["node"] for row in found] == [0, 0, 1, 1, 2, 2]
    leaders, others = found[::2], found[1::2]
    assert sorted(block for row in leaders for block in row["taken"]) == list(range(40))
    assert all(row["taken"] == [] for row in others)
    assert len(leaders[0]["taken"]) < min(len(row["taken"]) for row in leaders[1:])
    assert {row["sum"] for row in leaders} == {sum(range(40))}


def fail_on_one(folder: str) -> None:
    node = join_node()
    outcome = "no error"

    def work() -> None:
        if node == 1:
            raise ValueError("rollout.python is not there")

    try:
        on_every_node(work)
    except (NodeFailure, RankZeroError) as error:
        outcome = f"{type(error).__name__}: {error}"
    Path(folder, os.environ["RANK"]).write_text(outcome)
    if node == 1 and leads_node():

        def again() -> None:
            raise NodeFailure(outcome)

        Path(folder, "code").write_text(str(cli.reported(again)))
    dist.barrier()
    dist.destroy_process_group()


def test_the_failure_of_a_node_is_reported_there_with_its_name_and_fails_all(tmp_path):
    run_ranks(NUM_NODES * RANKS_A_NODE, fail_on_one, str(tmp_path))
    outcomes = [(tmp_path / str(rank)).read_text() for rank in range(NUM_NODES * RANKS_A_NODE)]
    assert outcomes[2].startswith("NodeFailure: node 1 (") and outcomes[2].endswith("rollout.python is not there")
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != 2]
    assert set(others) == {"RankZeroError: node 1 failed: ValueError: rollout.python is not there"}
    assert (tmp_path / "code").read_text() == "1"


def look_at_the_folder(folder: str) -> None:
    """The second node has a folder of its own by the same name."""
    node = join_node()
    runner.LATE_SECONDS = 1.0
    outcome = "seen"
    try:
        runner._check_shared(Path(folder, "own") if node == 1 else Path(folder))
    except (NodeFailure, RankZeroError) as error:
        outcome = f"{type(error).__name__}: {error}"
    Path(folder, os.environ["RANK"]).write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


def test_a_node_that_does_not_see_the_runs_folder_is_named(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ".seen_by_all").write_text("of an earlier start")
    run_ranks(NUM_NODES * RANKS_A_NODE, look_at_the_folder, str(tmp_path))
    outcomes = [(tmp_path / str(rank)).read_text() for rank in range(NUM_NODES * RANKS_A_NODE)]
    assert outcomes[2].startswith("NodeFailure: node 1 (")
    assert "runs_dir must be a folder that all nodes share" in outcomes[2]
    assert all(text.startswith("RankZeroError: node 1 failed") for rank, text in enumerate(outcomes) if rank != 2)


def test_one_node_takes_all_blocks():
    assert list(claimed(iter("abc"), "letters")) == ["a", "b", "c"]
    tally = Tally("alone")
    assert [tally.add(2), tally.add(3)] == [2, 5]
