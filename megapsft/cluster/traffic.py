"""What a rank sends in a step, over which link, and how long that takes where nothing hides it."""

from __future__ import annotations

from dataclasses import dataclass

from megapsft.cluster.efficiency import LINK, Execution, imbalance
from megapsft.cluster.hardware import Machines
from megapsft.cluster.memory import GRADIENT
from megapsft.cluster.sizes import Parameters, replicas
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh
from megapsft.platform.chips import GPU


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that talk to each other: `size` of them, every `stride`-th, as Megatron orders them (tp, cp, ep, dp, pp)."""

    size: int
    stride: int
    machines: Machines

    @property
    def together(self) -> int:
        """Ranks of the group on one machine."""
        return max(1, min(self.size, self.machines.gpus_per_node // self.stride))

    @property
    def inside(self) -> bool:
        return self.together == self.size

    @property
    def link(self) -> str:
        return "nvlink" if self.inside else "network"

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a ring: over the network those of one machine share the cards that they have."""
        gpu = self.machines.gpu
        return LINK * (gpu.nvlink if self.inside else min(gpu.nvlink, gpu.network * self.together))

    def exchanged(self, data: float, once_per_node: float = 1.0) -> dict[str, float]:
        """Bytes by link of an all-to-all of `data` bytes; on the network `once_per_node` times fewer."""
        by_link = {"nvlink": data * (self.together - 1) / self.size}
        if not self.inside:
            by_link["network"] = data * (self.size - self.together) / self.size / once_per_node
        return by_link


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends for one purpose, in one step."""

    purpose: str
    group: int  # ranks
    link: str  # nvlink, network or host
    sent: float  # bytes
    seconds: float  # where nothing hides it


def groups(mesh: Mesh, machines: Machines) -> dict[str, Group]:
    """By purpose."""
    dense, expert = replicas(mesh)

    def group(size: int, stride: int) -> Group:
        return Group(size=size, stride=stride, machines=machines)

    return {
        "tensor": group(mesh.tp, 1),
        "context": group(mesh.cp, mesh.tp),
        "expert tensor": group(mesh.etp, 1),
        "expert": group(mesh.ep, mesh.etp),
        "data": group(dense, mesh.tp),
        "expert data": group(expert, mesh.etp * mesh.ep),
        "pipeline": group(mesh.pp, mesh.world_size // mesh.pp),
    }


def of_layer(hf: HFConfig, mesh: Mesh, machines: Machines, tokens: int, itemsize: int, execution: Execution) -> list[Traffic]:
    """Of the forward pass of one layer over `tokens` positions; the backward pass sends as much."""
    links, found = groups(mesh, machines), []
    hidden = tokens * hf.hidden_size * itemsize
    if mesh.tp > 1:  # two all-reduces, or with sequence parallelism as many gathers and scatters; experts bring their own
        times = 2 if hf.num_experts else 4
        found.append(_ring("tensor", links["tensor"], times * hidden))
    if mesh.cp > 1:
        keys = 2 * mesh.cp * tokens * hf.num_key_value_heads * hf.head_dim * itemsize / mesh.tp
        found.append(_ring("context", links["context"], keys))
    if mesh.ep > 1:
        found += _dispatch(hf, mesh, links["expert"], 2 * hidden / mesh.tp, execution)
    if hf.num_experts and mesh.etp > 1:
        found.append(_ring("expert tensor", links["expert tensor"], 2 * hidden / mesh.tp * hf.num_experts_per_tok * mesh.etp))
    return found


def of_boundary(hf: HFConfig, mesh: Mesh, machines: Machines, tokens: int, itemsize: int) -> Traffic | None:
    """A microbatch handed to the next pipeline stage; its gradient comes back the same way."""
    if mesh.pp == 1:
        return None
    group = groups(mesh, machines)["pipeline"]
    sent = tokens * hf.hidden_size * itemsize / (mesh.tp if mesh.sequence_parallel else 1)
    seconds = sent / _rate(machines.gpu, group.link)
    return Traffic(purpose="pipeline", group=group.size, link=group.link, sent=sent, seconds=seconds)


def of_update(chunks: tuple[Parameters, ...], mesh: Mesh, machines: Machines, itemsize: int, sharded: bool) -> list[Traffic]:
    """Gradients reduced once an update, and parameters gathered where the optimizer is sharded."""
    links, found = groups(mesh, machines), []
    dense = sum(chunk.dense.plain for chunk in chunks)
    expert = sum(chunk.expert.plain for chunk in chunks)
    for name, numbers in (("data", dense), ("expert data", expert)):
        if numbers and links[name].size > 1:
            found.append(_ring(f"gradients, {name}", links[name], numbers * GRADIENT * (1 if sharded else 2)))
            if sharded:
                found.append(_ring(f"parameters, {name}", links[name], numbers * itemsize))
    return found


def _ring(purpose: str, group: Group, data: float) -> Traffic:
    """A gather or a scatter of `data` bytes in all; an all-reduce is both."""
    sent = data * (group.size - 1) / group.size
    return Traffic(purpose=purpose, group=group.size, link=group.link, sent=sent, seconds=sent / group.bandwidth)


def _dispatch(hf: HFConfig, mesh: Mesh, group: Group, data: float, execution: Execution) -> list[Traffic]:
    """Tokens to their experts and back: `data` bytes for one expert of each token."""
    each = data * hf.num_experts_per_tok * imbalance(hf.num_experts, mesh.ep, execution)
    once = max(1.0, hf.num_experts_per_tok * group.together / group.size) if execution.once_per_node else 1.0
    gpu, found = group.machines.gpu, []
    for link, sent in group.exchanged(each, once).items():
        found.append(Traffic(purpose="experts", group=group.size, link=link, sent=sent, seconds=sent / _rate(gpu, link)))
    return found


def _rate(gpu: GPU, link: str) -> float:
    """Bytes a second from one GPU to another."""
    return LINK * (gpu.nvlink if link == "nvlink" else gpu.network)
