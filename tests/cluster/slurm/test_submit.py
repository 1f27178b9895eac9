"""What is refused before it is queued, and what a dry run says. No Slurm is needed."""

from __future__ import annotations

import json

import pytest

from megapsft.checkpoint.hf import read_config
from megapsft.cluster.slurm import records
from megapsft.cluster.slurm.client import _parsed
from megapsft.cluster.slurm.config import ClusterConfig
from megapsft.cluster.slurm.failures import failures
from megapsft.cluster.slurm.logs import logs
from megapsft.cluster.slurm.servers import overrides
from megapsft.cluster.slurm.status import progress
from megapsft.cluster.slurm.submit import prepare
from megapsft.config import load_config
from megapsft.data.chat_template import ChatTemplate
from megapsft.errors import Refused
from megapsft.train.rollout_options import check_options
from megapsft.train.sources import load_dataset
from tests.command import megapsft
from tests.shipped import FOLDER, OF_PAPERS

H100 = ClusterConfig(gpu="h100")
MOE = FOLDER / "psft/qwen3-30b-a3b.yaml"
DAPO = FOLDER / "dapo/qwen2.5-7b-instruct.yaml"


@pytest.mark.parametrize(
    ("config", "set_", "how", "rule"),
    [
        (MOE, (), {"nodes": 1}, "needs 78 GiB of a GPU's 74 on 1 nodes of h100"),
        (MOE, (), {"nodes": 0}, "must be 1 or more"),
        (MOE, (), {"nodes": 4, "rollout_nodes": 1}, "are for SGLang servers, and this run starts none"),
        (MOE, ("parallel.tensor_model_parallel_size=3",), {"nodes": 4}, "must divide"),
        (MOE, ("run.dir=''",), {"nodes": 4}, "names no folder"),
        (DAPO, ("rollout.engine=sglang",), {"nodes": 4}, "is of rollout.engine=inprocess"),
        (DAPO, ("rollout.engine=sglang", "rollout.servers=9"), {"nodes": 4}, "are more than gpus_per_node=8"),
        (DAPO, ("rollout.engine=sglang", "rollout.fp8=true"), {"nodes": 4}, "is of servers that the run starts itself"),
        (DAPO, ("rewards=[]",), {"nodes": 4}, "names none"),
    ],
)
def test_refused_before_it_is_queued(config, set_, how, rule):
    with pytest.raises(Refused) as refused:
        prepare(config, load_config(config, set_), H100, **how)
    assert rule in str(refused.value)


@pytest.mark.parametrize("path", OF_PAPERS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_run_of_the_papers_is_ready_for_four_nodes(path):
    prepared = prepare(path, load_config(path), H100, nodes=4)
    assert prepared.script.render().count("--nodes=4") == 1


def test_a_dry_run_of_128_nodes_prints_the_script_and_writes_nothing(tmp_path):
    done = megapsft(
        "submit", str(MOE), "--nodes", "128", "--cluster", str(FOLDER / "cluster/example.yaml"), "--dry-run",
        "cluster.time=1:00:00", "train.batch_size=8192", "train.minibatch_size=1024", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=128\n" in done.stdout
    assert "#SBATCH --time=1:00:00\n" in done.stdout
    assert "found right by bash" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_checks_of_a_run_where_model_and_data_are_here(tiny_models, tiny_data, tmp_path):
    config = FOLDER / "psft/tiny-qwen3-gsm8k.yaml"
    here = [f"model.path={tiny_models('qwen3')}", f"run.dir={tmp_path / 'run'}"]
    nodes = ClusterConfig(gpus_per_node=0)
    assert prepare(config, load_config(config, [*here, f"data.path={tiny_data}"]), nodes, nodes=1).notes == ()
    with pytest.raises(Refused, match="column .nowhere.: is missing"):
        prepare(config, load_config(config, [*here, f"data.path={tiny_data}", "data.columns.prompt=nowhere"]), nodes, nodes=1)
    (note,) = prepare(config, load_config(config, [*here, "data.path=elsewhere.jsonl"]), nodes, nodes=1).notes
    assert "elsewhere.jsonl is not on this machine" in note


def test_rows_are_tokenised_before_the_job_waits_for_gpus(tiny_models, tiny_data, tmp_path, monkeypatch):
    path, kept = FOLDER / "psft/tiny-qwen3-gsm8k.yaml", tmp_path / "kept"
    here = [f"model.path={tiny_models('qwen3')}", f"run.dir={tmp_path / 'run'}", f"data.path={tiny_data}", f"data.cache={kept}"]
    config = load_config(path, here)
    with pytest.raises(Refused, match="column .nowhere.: is missing"):
        prepare(path, load_config(path, [*here, "data.columns.prompt=nowhere"]), ClusterConfig(), nodes=1)
    assert [file for file in kept.iterdir() if file.is_dir()] == []
    prepare(path, config, ClusterConfig(), nodes=1)
    (folder,) = [file for file in kept.iterdir() if file.is_dir()]

    monkeypatch.setattr(ChatTemplate, "encode_rows", None)  # the job has nothing left to tokenise
    assert len(load_dataset(config, ChatTemplate.load(config.model.path), read_config(config.model.path).vocab_size).groups) > 0
    assert [file for file in kept.iterdir() if file.is_dir()] == [folder]


def test_what_a_run_is_told_of_servers_passes_its_door():
    told = overrides("tensor", ["http://node1:20000", "http://node2:20064"])
    config = load_config(DAPO, ["rollout.engine=sglang", "rollout.max_batch_size=64", "rollout.servers=2", *told])
    check_options(config)
    assert config.rollout.urls == ("http://node1:20000", "http://node2:20064")
    assert config.rollout.weight_update == "distributed"
    assert not [text for text in overrides("disk", ["http://node1:1"]) if "weight_update" in text]


def test_what_slurm_says_of_a_job():
    line = (
        "JobId=12 JobName=megapsft-a run UserId=root(0) GroupId=root(0) Priority=1 Nice=0 Account=(null) QOS=(null) "
        "JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 ExitCode=0:0 RunTime=00:00:00 "
        "TimeLimit=00:20:00 TimeMin=N/A NodeList=(null) NumNodes=2 Command=/a folder/x.sbatch one two=3"
    )
    job = _parsed(line)
    assert (job.id, job.name, job.state, job.reason) == ("12", "megapsft-a run", "PENDING", "Resources")
    assert (job.restarts, job.limit, job.nodes, job.over) == (2, "00:20:00", "", False)


def test_the_rank_that_failed_first_and_said_something(tmp_path):
    records.append(tmp_path, records.Record(job="7", name="megapsft-x", log=str(tmp_path / "7.log")))
    attempt = tmp_path / "slurm/7.1"
    attempt.mkdir()
    (tmp_path / "slurm/7.0").mkdir()
    (attempt / "failures").write_text("100.5 3 node2 1\n100.1 2 node1 137\n100.3 1 node1 70\n")
    (attempt / "rank-3.log").write_text("Traceback\nValueError: no\n")
    (attempt / "rank-1.log").write_text("it hangs\n")
    (attempt / "rank-2.log").write_text("")
    assert [failure.rank for failure in failures(attempt)] == [1, 3, 2]
    assert [failure.how for failure in failures(attempt)] == [
        "hung (exit code 70)", "ended with exit code 1", "was killed by SIGKILL",
    ]  # fmt: skip
    text = "\n".join(logs(tmp_path))
    assert text.startswith("rank 1 on node1 hung (exit code 70)")
    assert "it hangs" in text
    assert list(logs(tmp_path, rank=3, lines=1))[1:] == ["ValueError: no"]
    for wrong in ({"rank": 9}, {"job": "8"}):
        with pytest.raises(Refused):
            list(logs(tmp_path, **wrong))


def test_a_folder_that_was_never_submitted_is_refused(tmp_path):
    for command in ("status", "logs", "cancel"):
        done = megapsft(command, str(tmp_path))
        assert done.returncode == 2
        assert "was not submitted as a job" in done.stderr


def test_how_far_a_run_is(tmp_path):
    assert progress(tmp_path).of is None
    (tmp_path / "config.yaml").write_text("train: {steps: 5, sft_warmup_steps: 1}\n")
    steps = [json.dumps({"perf/seconds": 2.0 * n, "train/loss": 0.1}) for n in (1, 2, 3)]
    (tmp_path / "steps.jsonl").write_text("\n".join(steps) + "\n")
    (tmp_path / "stopped.json").write_text('{"step": 3, "reason": "signal"}\n')
    now = progress(tmp_path)
    assert (now.steps, now.of, now.seconds, now.finished) == (3, 6, 4.0, False)
    assert now.stopped == {"step": 3, "reason": "signal"}


def test_jobs_are_written_down_once_each(tmp_path):
    records.append(tmp_path, records.Record(job="1", name="a"))
    records.append(tmp_path, records.Record(job="2", name="a"))
    records.append(tmp_path, records.Record(job="1", log="x"))
    assert records.read(tmp_path) == [records.Record(job="1", name="a", log="x"), records.Record(job="2", name="a")]
    assert records.attempts(tmp_path, "1") == []
