"""The commands that look for members worth combining: select, diversity."""

import pytest

import ensemble
import zoo

CORPUS = "--corpus corpus --valid dev --test test"


def test_select_keeps_the_budget_and_prints_what_is_proven(command, home):
    """One member fits, two do not."""
    size = zoo.Registry("registry.json").get("cylinder-a").parameters
    found = command(f"ensemble select {CORPUS} --max-parameters {size} --front --json", code=0).data
    assert found["proven"]
    assert len(found["members"]) == 1
    assert found["parameters"] <= size
    assert found["front"][0]["members"] == found["members"]
    assert "proven" in command(f"ensemble select {CORPUS} --front", code=0).out


def test_a_selection_can_be_saved(command, home):
    """Members and weights as they were printed."""
    found = command(f"ensemble select {CORPUS} --max-members 2 --save final --json", code=0).data
    final = ensemble.load_ensemble(zoo.Registry("registry.json"), "final")
    names = [about.reference.partition("@")[0] for about in final.members.about]
    assert dict(zip(names, final.rule.weights, strict=True)) == pytest.approx(found["weights"])
    assert found["saved"] == "final"


def test_a_budget_in_which_no_member_fits_is_an_error(command, home):
    """On one line."""
    assert "within" in command(f"ensemble select {CORPUS} --max-parameters 10", code=2).err


def test_diversity_shows_pairs_the_whole_and_contributions(command, home):
    """Three members, three pairs; one member, no pair and still valid JSON."""
    found = command(f"ensemble diversity {CORPUS} --json", code=0).data
    assert len(found["pairs"]) == len(found["members"]) == 3
    assert sum(found["unsolved"].values()) > 0
    assert "disagreement" in command(f"ensemble diversity {CORPUS}", code=0).out
    assert command(f"ensemble diversity {CORPUS} --members other --json", code=0).data["pairs"] == []
