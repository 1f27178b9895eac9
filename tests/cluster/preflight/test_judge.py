"""The verdict: who is to blame for what was found, and what is nobody's fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapsft.cluster.preflight.finding import Finding, read
from megapsft.cluster.preflight.judge import BAD_NODES, GOOD, NOBODY, TRY_PAIRS, judge, judge_folder, rounds_of
from megapsft.cluster.preflight.packages import compare
from megapsft.cluster.slurm.script import LAUNCHERS
from megapsft.errors import Refused

FOUR = ("node1", "node2", "node3", "node4")


def found(node: str, check: str, good: bool = True, value: str = "as it should be") -> Finding:
    return Finding(node=node, check=check, good=good, value=value)


def answers(nodes=FOUR, *, without=(), torch=None) -> list[Finding]:
    """Of nodes on which all is good."""
    told = []
    for node in nodes:
        if node not in without:
            told.append(found(node, "packages", value=f"torch {(torch or {}).get(node, '2.13')}"))
            told += [found(node, "answer"), found(node, "all-reduce")]
    return told


def without_network(nodes=FOUR) -> list[Finding]:
    """All good but that ranks do not reach one another."""
    return [found(f.node, f.check, f.check != "all-reduce", f.value) for f in answers(nodes)]


def pairs(nodes, broken=()) -> list[Finding]:
    told = [(node, pair) for pair in (pair for pairs in rounds_of(nodes) for pair in pairs) for node in pair]
    return [found(node, f"pair {','.join(pair)}", pair not in broken) for node, pair in told]


def test_all_good():
    verdict = judge(FOUR, answers(), {})
    assert (verdict.code, verdict.bad, verdict.wrong) == (GOOD, (), ())


def test_a_node_that_does_not_answer_is_bad():
    verdict = judge(FOUR, answers(without=("node3",)), {})
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node3",))
    assert [finding.value for finding in verdict.wrong] == ["no answer"]


def test_a_node_that_hangs_in_the_middle_is_bad():
    told = [told for told in answers() if told.node != "node2" or told.check == "packages"]
    verdict = judge(FOUR, told, {})
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node2",))
    assert [finding.value for finding in verdict.wrong] == ["nothing after packages"]


def test_where_nobody_answers_it_is_no_nodes_fault():
    assert judge(FOUR, [], {}).code == NOBODY
    assert judge(("node1",), [], {}).bad == ("node1",)


def test_what_a_node_finds_of_itself_is_its_own_fault_and_those_of_two_are_both_named():
    told = [*answers(), found("node4", "clocks", False, "GPU 3"), found("node2", "port", False, "port 20001 is taken")]
    verdict = judge(FOUR, told, {})
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node2", "node4"))


def test_what_is_wrong_with_all_is_the_jobs_fault_and_with_the_only_one_its_own():
    """Such as tasks that are bound to a GPU each."""
    verdict = judge(FOUR, [*answers(), *(found(node, "device", False) for node in FOUR)], {})
    assert (verdict.code, verdict.bad) == (NOBODY, ())
    verdict = judge(FOUR[:1], [*answers(FOUR[:1]), found("node1", "device", False)], {})
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node1",))


def test_a_run_folder_without_room_is_no_nodes_fault():
    verdict = judge(FOUR, [*answers(), found("node2", "run disk", False, "0.1 GiB free")], {})
    assert (verdict.code, verdict.bad) == (NOBODY, ())


@pytest.mark.parametrize(
    ("missing", "bad"),
    [(("node2",), ("node2",)), (("node2", "node3"), ("node2", "node3")), (FOUR[1:], ("node1",)), (FOUR, ())],
)
def test_where_all_others_do_not_see_what_the_first_wrote_it_is_the_first(missing, bad):
    told = answers() + [found(node, "shared folder", False) for node in missing]
    verdict = judge(FOUR, told, {})
    assert (verdict.code, verdict.bad) == (BAD_NODES if bad else NOBODY, bad)


@pytest.mark.parametrize(
    ("versions", "submitted", "wrong"),
    [
        (["1", "1", "2", "1"], {}, {2}),
        (["2", "1", "1", "1"], {"torch": "2"}, {0}),  # more than half go before what was submitted
        (["1", "2"], {"torch": "2"}, {0}),
        (["1", "2"], {"torch": "1"}, {1}),
        (["1", "2"], {"torch": "3"}, {1}),  # nobody has it: as on the first
        (["1", "2"], {}, {1}),
        (["1", "2", "3", "2"], {"torch": "1"}, {1, 2, 3}),
        (["none", "2", "2"], {}, {0}),
        (["1", "1"], {"torch": "2"}, set()),  # a login node may have another environment
    ],
)
def test_the_right_version_is_the_majoritys_else_the_submitters_else_the_firsts(versions, submitted, wrong):
    told = compare({f"node{number}": {"torch": version} for number, version in enumerate(versions)}, submitted)
    assert {finding.node for finding in told} == {f"node{number}" for number in wrong}
    assert all(finding.value.startswith("torch ") and finding.rule and finding.remedy for finding in told)


def test_another_version_is_found_before_the_network_is_blamed():
    told = [finding for finding in answers(torch={"node2": "2.12"}) if finding.check != "all-reduce"]
    verdict = judge(FOUR, told, {})
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node2",))


def test_ranks_that_do_not_reach_one_another_are_tried_in_pairs():
    verdict = judge(FOUR, without_network(), {})
    assert verdict.code == TRY_PAIRS
    assert verdict.rounds == ((("node1", "node2"), ("node3", "node4")), (("node2", "node3"), ("node4", "node1")))


@pytest.mark.parametrize("count", range(2, 10))
def test_every_node_is_in_two_pairs_and_never_twice_in_a_round(count):
    nodes = [f"node{number}" for number in range(count)]
    rounds = rounds_of(nodes)
    flat = [node for pairs in rounds for pair in pairs for node in pair]
    assert all(flat.count(node) == min(2, count - 1) for node in nodes)
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)


@pytest.mark.parametrize(
    ("nodes", "broken", "bad"),
    [
        (FOUR, [("node2", "node3"), ("node3", "node4")], ("node3",)),
        (FOUR[:3], [("node1", "node2"), ("node2", "node3")], ("node2",)),
        (FOUR, [("node2", "node3")], ()),  # one of the two, or the way between them
        (FOUR, [("node1", "node2"), ("node2", "node3"), ("node3", "node4"), ("node4", "node1")], ()),
        (FOUR[:2], [("node1", "node2")], ()),
        (FOUR, [], ()),  # all neighbours reach each other, and all together do not
    ],
)
def test_the_node_that_fails_with_all_its_partners_is_to_blame(nodes, broken, bad):
    verdict = judge(nodes, without_network(nodes) + pairs(nodes, broken), {})
    assert (verdict.code, verdict.bad) == (BAD_NODES if bad else NOBODY, bad)
    assert verdict.wrong


def test_a_pair_of_which_one_says_nothing_has_failed():
    told = [finding for finding in pairs(FOUR) if (finding.node, finding.check) != ("node3", "pair node3,node4")]
    told = [finding for finding in told if (finding.node, finding.check) != ("node3", "pair node2,node3")]
    assert judge(FOUR, without_network() + told, {}).bad == ("node3",)


def test_one_node_whose_ranks_do_not_reach_one_another_is_bad():
    assert judge(FOUR[:1], without_network(FOUR[:1]), {}).bad == ("node1",)


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_is_judged_and_told(relative, tmp_path, monkeypatch):
    folder = tmp_path / "slurm/7.0/preflight"
    folder.mkdir(parents=True)
    noise = ["3: a warning of some library", "{}", '{"node": 1', "", "slurmstepd: error: ..."]
    told = answers(torch={"node1": "1", "node2": "1", "node3": "2", "node4": "2"})
    (folder / "answers").write_text("\n".join([*noise, *(f"{rank}: {f.line()}" for rank, f in enumerate(told))]) + "\n")
    (tmp_path / "slurm/packages.json").write_text('{"torch": "1"}')
    monkeypatch.chdir(folder.parent)
    verdict = judge_folder(Path("preflight") if relative else folder, FOUR)
    assert (verdict.code, verdict.bad) == (BAD_NODES, ("node3", "node4"))
    assert (folder / "bad-nodes").read_text() == "node3,node4\n"
    assert json.loads((folder / "verdict.json").read_text())["bad"] == ["node3", "node4"]


def test_where_the_answers_are_not_seen_nobody_judges(tmp_path):
    with pytest.raises(Refused, match="answers: is not here"):
        judge_folder(tmp_path, FOUR)


def test_the_batch_script_knows_the_same_codes():
    script = (LAUNCHERS / "preflight.sh").read_text()
    assert f"readonly GOOD={GOOD} BAD_NODES={BAD_NODES} NOBODY={NOBODY} TRY_PAIRS={TRY_PAIRS} " in script


def test_a_finding_that_is_too_long_for_a_line_of_srun_is_cut_and_still_read():
    long = Finding(node="node1", check="gpus", good=False, value='"\\' * 4000, rule="r" * 4000, remedy="short")
    assert len(long.line()) < 1000
    (back,) = read([f"12: {long.line()}\n"])
    assert (back.node, back.check, back.good, back.remedy) == ("node1", "gpus", False, "short")
    assert '"\\"\\'.startswith(back.value[:4])


def test_lines_that_srun_breaks_between_those_of_other_nodes_are_whole_again():
    """As it printed them on two nodes: a piece ended in the middle of a word, and another node's lines came before the rest."""
    mine, other = (Finding(node=node, check="packages", good=True, value="sglang 0.5.23") for node in ("node1", "node2"))
    line = mine.line()
    for cut in range(1, len(line)):
        lines = [f"0: {line[:cut]}\n", f"1: {other.line()}\n", "1: noise {\n", f"0: {line[cut:]}\n", f"0: {other.line()}\n"]
        assert sorted(read(lines), key=lambda finding: finding.node) == [mine, other, other]
    assert read(["0: {\n", "0: nothing\n", '0: {"json": "of something else"}\n', f"0: {line}\n"]) == [mine]
