"""From what all nodes found to a verdict: go on, go on without some of them, or do not go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megapsft.cluster.preflight import packages
from megapsft.cluster.preflight.examine import ALL_REDUCE, ANSWER, PAIR
from megapsft.cluster.preflight.finding import Finding, read
from megapsft.cluster.preflight.node import RUN_DISK, SHARED
from megapsft.errors import Refused

GOOD = 0
BAD_NODES = os.EX_UNAVAILABLE  # 69: they are named in DIR/bad-nodes
NOBODY = os.EX_PROTOCOL  # 76: something is wrong, and no node is to blame for it
TRY_PAIRS = 79  # ranks do not reach one another: DIR/pairs names the pairs of nodes to try, a round a line
ANSWERS, BAD_NODES_FILE, PAIRS_FILE, VERDICT_FILE = "answers", "bad-nodes", "pairs", "verdict.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of the job.

    Args:
        code: GOOD, BAD_NODES, NOBODY or TRY_PAIRS.
        bad: the nodes that are to blame.
        wrong: what is wrong, whoever is to blame.
        rounds: pairs of nodes to try next, where the code says so; those of a round at once.
        good: what went well, one finding of each kind.
    """

    code: int
    bad: tuple[str, ...] = ()
    wrong: tuple[Finding, ...] = ()
    rounds: tuple[tuple[tuple[str, str], ...], ...] = ()
    good: tuple[Finding, ...] = ()


def judge_folder(folder: Path, nodes: Sequence[str]) -> Verdict:
    """Read what was collected in `folder`, and leave the verdict there.

    Args:
        nodes: of the job, in its order.

    Raises:
        Refused: nothing was collected, or it cannot be seen from here.
    """
    answers = folder / ANSWERS
    if not answers.is_file():
        raise Refused(str(answers), "is not here", "judge on a node that shares the folder with the first one")
    findings = read(answers.read_text(errors="replace").splitlines())
    recorded = folder.absolute().parents[1] / packages.FILE  # RUN/slurm/<job>.<restart>/preflight -> RUN/slurm
    verdict = judge(nodes, findings, json.loads(recorded.read_text()) if recorded.is_file() else {})
    told = asdict(verdict) | {"findings": [asdict(finding) for finding in findings]}
    (folder / VERDICT_FILE).write_text(json.dumps(told, indent=1) + "\n")
    (folder / BAD_NODES_FILE).write_text(",".join(verdict.bad) + "\n")
    (folder / PAIRS_FILE).write_text("".join(" ".join(map(",".join, pairs)) + "\n" for pairs in verdict.rounds))
    return verdict


def judge(nodes: Sequence[str], findings: Sequence[Finding], submitted: Mapping[str, str]) -> Verdict:
    """The verdict on `nodes`, by what they found.

    Args:
        submitted: package -> version of the machine that submitted the job, where it is known.
    """
    wrong = [*_silent(nodes, findings), *(finding for finding in findings if not finding.good and not _of_network(finding))]
    wrong += packages.compare(_versions(nodes, findings), submitted)
    if any(finding.check == RUN_DISK for finding in wrong):  # it is the same one for all
        return Verdict(code=NOBODY, wrong=tuple(wrong))
    bad = _blamed(nodes, wrong)
    if wrong:
        return Verdict(code=BAD_NODES if bad else NOBODY, bad=bad, wrong=tuple(wrong))
    return _judge_network(nodes, findings)


def _silent(nodes: Sequence[str], findings: Sequence[Finding]) -> list[Finding]:
    """Of nodes that have not come to the end of what they look at."""
    whole = {finding.node for finding in findings if finding.check == ANSWER}
    last = {finding.node: finding.check for finding in findings}
    rule, remedy = "must answer in time", "see `scontrol show node`, slurmd's log there, and DIR/errors"
    return [
        Finding(
            node=node, check=ANSWER, good=False, value=f"nothing after {last[node]}" if node in last else "no answer",
            rule=rule, remedy=remedy,
        )
        for node in nodes
        if node not in whole
    ]  # fmt: skip


def _versions(nodes: Sequence[str], findings: Sequence[Finding]) -> dict[str, dict[str, str]]:
    """node -> package -> version, of those that answered."""
    found: dict[str, dict[str, str]] = {}
    for node in nodes:
        told = [finding.value.split(" ", 1) for finding in findings if (finding.node, finding.check) == (node, packages.CHECK)]
        if told:
            found[node] = {name: version for name, version in told}
    return found


def _blamed(nodes: Sequence[str], wrong: Sequence[Finding]) -> tuple[str, ...]:
    """Who is to blame. What is wrong with all says nothing of any; what all but the first do not see is the fault of that one."""
    blamed = set()
    for check in {finding.check for finding in wrong}:
        of_check = {finding.node for finding in wrong if finding.check == check}
        if len(nodes) > 1 and of_check == set(nodes):
            continue
        if len(nodes) > 2 and check in (ANSWER, SHARED) and of_check == set(nodes[1:]):
            of_check = {nodes[0]}
        blamed |= of_check
    return tuple(node for node in nodes if node in blamed)


def _judge_network(nodes: Sequence[str], findings: Sequence[Finding]) -> Verdict:
    """Once every node is right in itself."""
    reached = {finding.node for finding in findings if finding.check == ALL_REDUCE and finding.good}
    if reached == set(nodes):
        return Verdict(code=GOOD, good=tuple({finding.check: finding for finding in findings}.values()))
    failed = [finding for finding in findings if finding.check == ALL_REDUCE and not finding.good]
    rule, remedy = "must end", "see DIR/errors"
    failed += [
        Finding(node=node, check=ALL_REDUCE, good=False, value="no answer", rule=rule, remedy=remedy)
        for node in nodes
        if node not in {finding.node for finding in findings if finding.check == ALL_REDUCE}
    ]
    if len(nodes) == 1:
        return Verdict(code=BAD_NODES, bad=tuple(nodes), wrong=tuple(failed))
    rounds = rounds_of(nodes)
    if not any(finding.check.startswith(f"{PAIR} ") for finding in findings):
        return Verdict(code=TRY_PAIRS, wrong=tuple(failed), rounds=rounds)
    broken = [pair for pairs in rounds for pair in pairs if not _pair_reached(pair, findings)]
    bad = tuple(node for node in nodes if len(nodes) > 2 and _fails_with_all(node, rounds, broken))
    if len(bad) == len(nodes):
        bad = ()
    wrong = [
        Finding(
            node=first, check=f"{PAIR} {first},{second}", good=False, value="do not reach one another",
            rule="two neighbours must", remedy="see the network between them",
        )
        for first, second in broken
    ]  # fmt: skip
    return Verdict(code=BAD_NODES if bad else NOBODY, bad=bad, wrong=(*failed, *wrong))


def rounds_of(nodes: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Every node with the next, and the last with the first; in each round a node is in one pair at most."""
    ring = [(nodes[number], nodes[(number + 1) % len(nodes)]) for number in range(len(nodes) if len(nodes) > 2 else 1)]
    last = ring[-1:] if len(ring) % 2 and len(ring) > 1 else []
    ring = ring[: len(ring) - len(last)]
    return tuple(tuple(pairs) for pairs in (ring[::2], ring[1::2], last) if pairs)


def _pair_reached(pair: tuple[str, str], findings: Sequence[Finding]) -> bool:
    told = [finding for finding in findings if finding.check == f"{PAIR} {','.join(pair)}"]
    return {finding.node for finding in told if finding.good} == set(pair)


def _fails_with_all(node: str, rounds: Sequence[Sequence[tuple[str, str]]], broken: Sequence[tuple[str, str]]) -> bool:
    return all(pair in broken for pairs in rounds for pair in pairs if node in pair)


def _of_network(finding: Finding) -> bool:
    return finding.check == ALL_REDUCE or finding.check.startswith(f"{PAIR} ")
