"""Ranks of a plan: those that share one copy of the model, and those of a BatchNorm group."""

from __future__ import annotations

from dataclasses import replace

from seer_scale.planner import plan


def test_groups_are_those_of_the_job_of_a_node_or_of_so_many_ranks() -> None:
    layout = replace(plan("debug", "v100_32gb", nodes=1, gpus_per_node=8).layout, nodes=3)
    assert layout.world == 24
    assert [layout.group_ranks(size) for size in (0, -1, 4)] == [24, 8, 4]


def test_a_copy_of_hybrid_sharding_lies_on_a_node_or_on_as_many_ranks_as_asked() -> None:
    for asked, shards in (([], 8), (["sharding.shard_size=4"], 4)):
        found = plan(
            "debug", "v100_32gb", nodes=2, gpus_per_node=8, strategy="hsdp", overrides=asked
        )
        assert found.layout.shards == shards
