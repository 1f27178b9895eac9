"""Every objective, found by its file, has the loss, gradient and metrics of one rank on every split; experts are balanced.

The variants that an objective's own test lists are held to it under context and data parallelism, which cut samples and updates.
"""

from __future__ import annotations

import pytest

from megapsft.data.arithmetic import generate, preferences, rollouts, write_jsonl
from megapsft.objectives.registry import objective_names
from tests.invariants.compare import perturbed
from tests.invariants.objectives import difference, measure_objectives
from tests.invariants.splits import split
from tests.objectives.test_contract import variants
from tests.ranks import run_ranks

TOLERANCE = 1e-5
DEFAULTS = [{"name": name} | variants(name)[0] for name in objective_names()]
VARIANTS = [{"name": name} | options for name in objective_names() for options in variants(name)]
SPLITS = [
    ("dense", split("cp2", 2, pack=192, cp=2), VARIANTS),
    ("dense", split("dp2", 2, pack=192), VARIANTS),
    ("dense", split("packed to 1024", pack=1024), DEFAULTS),
    ("dense", split("tp2+cp2+sp", 4, pack=192, tp=2, cp=2, sp=True), DEFAULTS),
    ("dense", split("tp2", 2, pack=192, tp=2), DEFAULTS),
    ("dense", split("cp2 unpacked", 2, packing=False, mbs=2, cp=2), DEFAULTS),
    ("dense", split("pp2+vpp2", 2, pack=192, pp=2, vpp=2), DEFAULTS),
    ("dense", split("dp2+zero1", 2, pack=192, zero1=True), DEFAULTS),
    ("moe", split("tp2+sp", 2, pack=192, tp=2, sp=True), DEFAULTS),
    ("moe", split("cp2 recompute full", 2, pack=192, cp=2, recompute="full"), DEFAULTS),
    ("moe", split("pp2", 2, pack=192, pp=2), DEFAULTS),
    ("moe", split("ep2", 2, pack=192, ep=2), DEFAULTS),
]
EXPERTS = ("model.moe_aux_loss_coeff=0.1",)
REFERENCE = split("1 rank", packing=False, mbs=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """measure(kind, split, sections), on data and models made once."""
    folder = tmp_path_factory.mktemp("objectives")
    data = {"rollouts": folder / "rollouts.jsonl", "preferences": folder / "preferences.jsonl"}
    write_jsonl(data["rollouts"], rollouts(generate(24, 7, "easy"), seed=0, each=3))
    write_jsonl(data["preferences"], preferences(generate(24, 7, "easy"), seed=0))
    models, references = {}, {}

    def measure(kind, case, sections):
        if kind not in models:
            models[kind] = perturbed(folder, kind, data["rollouts"], names=("old", "ref", "new"))
        options = case.options + (EXPERTS if kind == "moe" else ())
        return run_ranks(case.world, measure_objectives, models[kind], data, options, sections)[0]

    def reference(kind):
        if kind not in references:
            held = VARIANTS if any(kind == of and sections is VARIANTS for of, _, sections in SPLITS) else DEFAULTS
            references[kind] = dict(zip(map(str, held), measure(kind, REFERENCE, held), strict=True))
        return references[kind]

    return measure, reference


@pytest.mark.parametrize(("kind", "case", "sections"), SPLITS, ids=[f"{kind}-{case.name}" for kind, case, _ in SPLITS])
def test_every_objective_is_the_same_on_every_split(kind, case, sections, world):
    measure, reference = world
    expected = reference(kind)
    for section, ours in zip(sections, measure(kind, case, sections), strict=True):
        differences = difference(ours, expected[str(section)])
        worst = max(differences, key=differences.get)
        assert differences[worst] <= TOLERANCE, (section, worst, differences[worst])
