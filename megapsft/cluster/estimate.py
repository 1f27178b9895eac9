"""The plan of a run on a cluster: whether it fits, how long a step takes, and of what both are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from megapsft.cluster import compute, traffic
from megapsft.cluster.efficiency import LINK, Execution
from megapsft.cluster.generation import generation_seconds
from megapsft.cluster.hardware import Machines
from megapsft.cluster.memory import USABLE, StageMemory, stage_memory
from megapsft.cluster.sizes import Parameters, replicas, trained_of_stage
from megapsft.cluster.traffic import Traffic
from megapsft.cluster.workload import Workload, workload
from megapsft.config import Config
from megapsft.errors import Refused
from megapsft.models.flops import model_flops
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh, plan_mesh, with_overlap
from megapsft.policy.build import DTYPES, model_shape
from megapsft.train.fp8 import check_fp8
from megapsft.train.phases import Phase, phases, reference_needs
from megapsft.train.plan import check_adapters, check_minibatch


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on the ranks that take longest; they add up."""

    compute: float  # forward and backward passes of all updates
    communication: float  # between tensor, context and expert ranks, and pipeline stages; where nothing hides it
    bubble: float  # pipeline stages that wait for others
    gradients: float  # reduced, and parameters gathered, as far as no pass hides it
    optimizer: float
    old_policy: float  # passes without gradient
    reference: float  # passes, and weights exchanged with those in host memory
    critic: float
    rollouts: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is known of a run before it is queued."""

    config: Config
    hf: HFConfig
    machines: Machines
    mesh: Mesh
    work: Workload
    stages: tuple[StageMemory, ...]
    time: StepTime
    traffic: tuple[Traffic, ...]  # of a rank that sends most, in a step

    @property
    def usable(self) -> float:
        """Bytes of a GPU."""
        return USABLE * self.machines.gpu.memory

    @property
    def peak(self) -> float:
        """Bytes on the ranks of the fullest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, each token counted once a step."""
        return self.work.tokens / self.time.total

    @property
    def bubble(self) -> float:
        """The part of a pipeline's time in which a stage waits."""
        idle = (self.mesh.pp - 1) / self.mesh.vpp
        return idle / (idle + self.work.microbatches)

    @property
    def model_flops_utilization(self) -> float:
        tokens, frozen = self.work.tokens, self.config.lora.rank is not None
        useful = model_flops(self.hf, tokens, tokens * self.work.length, frozen=frozen) / self.time.total
        return useful / (self.machines.world_size * self.machines.gpu.bf16)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON: bytes and seconds."""
        return {
            "mesh": asdict(self.mesh),
            "fits": self.fits,
            "usable_bytes": self.usable,
            "peak_bytes": self.peak,
            "stages": [asdict(stage) | {"total": stage.total} for stage in self.stages],
            "seconds_per_step": asdict(self.time) | {"total": self.time.total},
            "bubble": self.bubble,
            "updates_per_step": self.work.updates,
            "microbatches_per_update": self.work.microbatches,
            "tokens_per_step": self.work.tokens,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second / self.machines.world_size,
            "model_flops_utilization": self.model_flops_utilization,
            "traffic_per_step": [asdict(one) for one in self.traffic],
        }


def estimate(
    config: Config, hf: HFConfig, machines: Machines, execution: Execution | None = None, phase: Phase | None = None
) -> Estimate:
    """The plan of `config` on these machines. No data is read, and no weights.

    Args:
        execution: of another system; None: ours, with products of layers in FP8 where the config has them so.
        phase: the last of `config`, where it was made already: of thousands of splits it is the same.

    Raises:
        Refused: a split that does not fit the model or the number of GPUs, or leaves ranks without a sample; a minibatch that
            does not divide the batch; samples longer than the model's positions; what the objective refuses; what a run with
            adapters or FP8 would be refused for on such GPUs.
    """
    check_minibatch(config.train)
    if config.data.max_length > hf.max_position_embeddings:
        rule = f"exceeds max_position_embeddings={hf.max_position_embeddings} of {config.model.path}"
        remedy = f"use data.max_length={hf.max_position_embeddings} or less"
        raise Refused(f"data.max_length={config.data.max_length}", rule, remedy)
    dispatcher = config.model.moe_token_dispatcher_type
    mesh = plan_mesh(config.parallel, machines.world_size, model_shape(hf), on_cuda=True, dispatcher=dispatcher)
    phase = phase or phases(config)[-1]
    check_adapters(config, mesh, hf, phase.objective)
    check_fp8(config, hf, mesh, machines.of_rank, compares=bool(reference_needs(phase.objective)))
    work = workload(config, mesh, phase)
    execution = execution or Execution(fp8=config.fp8.format is not None)
    time, sent = _Step(config, hf, machines, mesh, work, execution).take()
    capability = machines.gpu.capability
    stages = tuple(stage_memory(config, hf, mesh, work, stage, execution, capability) for stage in range(mesh.pp))
    return Estimate(config=config, hf=hf, machines=machines, mesh=mesh, work=work, stages=stages, time=time, traffic=tuple(sent))


@dataclass(frozen=True)
class _Step:
    """The arithmetic of a step's time."""

    config: Config
    hf: HFConfig
    machines: Machines
    mesh: Mesh
    work: Workload
    execution: Execution

    def take(self) -> tuple[StepTime, list[Traffic]]:
        mesh, work = self.mesh, self.work
        forward, backward = self._passes(head=True)
        exchanged = self._exchanged()
        one_way = sum(one.seconds * (1 - self._hidden(one)) for one in exchanged)
        both_ways = sum(one.seconds * (1 - self._hidden(one)) * self._ways(one) for one in exchanged)
        waits = (mesh.pp - 1) / mesh.vpp
        reduced, update = self._reduced(forward, backward), self._optimizer()
        a_pass = (work.microbatches + waits) * (forward + one_way)
        time = StepTime(
            compute=work.updates * work.microbatches * (forward + backward),
            communication=work.updates * work.microbatches * both_ways,
            bubble=work.updates * waits * (forward + backward + both_ways),
            gradients=work.updates * reduced,
            optimizer=work.updates * update,
            old_policy=work.old_passes * a_pass,
            reference=work.reference_passes * (a_pass + self._swap()),
            critic=work.updates * self._critic(waits, one_way, both_ways, reduced + update) if work.critic else 0.0,
            rollouts=generation_seconds(self.config, self.hf, mesh, work, self.machines.gpu),
        )
        updates, without = work.updates * (1 + work.critic), work.old_passes + work.reference_passes + work.updates * work.critic
        inside = [_times(one, work.microbatches * (updates * self._ways(one) + without)) for one in exchanged]
        return time, inside + [_times(one, updates) for one in self._of_update()]

    def _critic(self, waits: float, one_way: float, both_ways: float, after: float) -> float:
        """Seconds of an update of the value function, and of the pass before it that gives values."""
        forward, backward = self._passes(head=False)
        return (self.work.microbatches + waits) * (forward + one_way + forward + backward + both_ways) + after

    def _passes(self, head: bool) -> tuple[float, float]:
        """Seconds of the slowest stage for the forward and the backward pass of a microbatch."""
        hf, mesh, frozen = self.hf, self.mesh, self.config.lora.rank is not None
        layers = hf.num_hidden_layers // mesh.pp
        layer = compute.layer_forward(hf, mesh, self.work)
        forward = layer * layers
        backward = (compute.backward(layer, frozen) + compute.layer_again(layer, hf, self.config)) * layers
        if head:
            output = compute.head_forward(hf, mesh, self.work, self.config.model.make_vocab_size_divisible_by)
            forward += output
            backward += compute.head_again(output, self.config) + compute.backward(output, frozen)
        return tuple(compute.seconds(done, hf, mesh, self.machines.gpu, self.execution) for done in (forward, backward))

    def _exchanged(self) -> list[Traffic]:
        """Of a microbatch's forward pass through one stage."""
        config, mesh = self.config, self.mesh
        tokens, itemsize = self.work.positions // mesh.cp, DTYPES[config.model.dtype].itemsize
        layer = traffic.of_layer(self.hf, mesh, self.machines, tokens, itemsize, self.execution)
        found = [_times(one, self.hf.num_hidden_layers // mesh.pp) for one in layer]
        boundary = traffic.of_boundary(self.hf, mesh, self.machines, tokens, itemsize)
        return found + ([_times(boundary, mesh.vpp)] if boundary else [])

    def _hidden(self, one: Traffic) -> float:
        """The part of the exchange that computation hides."""
        if one.purpose == "experts":
            return self.execution.hidden_dispatch
        return float(one.purpose == "pipeline" and self.mesh.overlap_p2p_comm)

    def _ways(self, one: Traffic) -> int:
        """How often it is sent in training: forward, backward, and where the forward pass is done again."""
        parallel = self.config.parallel
        full = parallel.recompute_granularity == "full" and one.purpose != "pipeline"
        experts = parallel.recompute_granularity == "selective" and "moe" in parallel.recompute_modules
        return 3 if full or (experts and one.purpose.startswith("expert")) else 2

    def _of_update(self) -> list[Traffic]:
        itemsize, sharded = DTYPES[self.config.model.dtype].itemsize, self.config.parallel.use_distributed_optimizer
        return traffic.of_update(self._trained(), self.mesh, self.machines, itemsize, sharded)

    def _trained(self) -> tuple[Parameters, ...]:
        """Of the first stage."""
        return trained_of_stage(self.hf, self.mesh, self.config.model.make_vocab_size_divisible_by, self.config.lora, 0)

    def _reduced(self, forward: float, backward: float) -> float:
        """Seconds of an update in which gradients or parameters are on their way and nothing is computed.

        Overlapped, gradients are reduced behind the last microbatch's backward pass, and parameters gathered behind the first
        one's forward pass.
        """
        swapped = self.work.reference_passes > 0 and self.config.reference.placement == "swap"
        parallel = with_overlap(self.config.parallel, on_gpus=True, swapped=swapped)
        spent = {"gradients": 0.0, "parameters": 0.0}
        for one in self._of_update():
            spent[one.purpose.split(",")[0]] += one.seconds
        hidden = {"gradients": backward * parallel.overlap_grad_reduce, "parameters": forward * parallel.overlap_param_gather}
        return sum(max(0.0, spent[name] - hidden[name]) for name in spent)

    def _optimizer(self) -> float:
        chunks = self._trained()
        dense, expert = replicas(self.mesh) if self.config.parallel.use_distributed_optimizer else (1, 1)
        numbers = sum(chunk.dense.plain / dense + chunk.expert.plain / expert for chunk in chunks)
        return compute.optimizer_seconds(numbers, self.machines.gpu)

    def _swap(self) -> float:
        """The weights to the host and those of the reference to the GPU, and back."""
        if self.config.reference.placement == "copy":
            return 0.0
        weights = sum(chunk.total for chunk in self._trained()) * DTYPES[self.config.model.dtype].itemsize
        return 4 * weights / (LINK * self.machines.gpu.host)


def _times(one: Traffic, times: float) -> Traffic:
    return Traffic(purpose=one.purpose, group=one.group, link=one.link, sent=one.sent * times, seconds=one.seconds * times)
