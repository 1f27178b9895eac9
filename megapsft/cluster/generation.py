"""How long responses take that are sampled a token at a time: bound by memory, whose every weight is read for each token."""

from __future__ import annotations

from megapsft.cluster.efficiency import EAGER_LAYER, HBM
from megapsft.cluster.sizes import of_layer
from megapsft.cluster.workload import Workload
from megapsft.config import Config
from megapsft.models.families import parameter_count
from megapsft.models.hf_config import HFConfig
from megapsft.parallel import Mesh
from megapsft.platform.chips import GPU
from megapsft.policy.build import DTYPES


def generation_seconds(config: Config, hf: HFConfig, mesh: Mesh, work: Workload, gpu: GPU) -> float:
    """Of a step's responses, all of them as long as rollout.max_tokens. 0 where nothing is sampled."""
    if not work.requests:
        return 0.0
    options, itemsize = config.rollout, DTYPES[config.model.dtype].itemsize
    if options.engine == "inprocess":
        groups, split, at_once = mesh.dp * mesh.cp, mesh.tp, options.max_batch_size
        launches = EAGER_LAYER * hf.num_hidden_layers
        layers = of_layer(hf, mesh.tp, mesh.ep, mesh.etp).total * hf.num_hidden_layers  # stages go one after the other
        weights = (layers + hf.vocab_size * hf.hidden_size / mesh.tp) * itemsize
    else:
        groups, split, at_once = len(options.urls) or options.servers, options.tensor_parallel_size, options.requests_per_server
        launches = 0.0
        weights = parameter_count(hf) * (1 if options.fp8 else itemsize) / split
    requests = -(-work.requests // groups)
    together = min(requests, at_once)
    keys = 2 * hf.num_key_value_heads * hf.head_dim * hf.num_hidden_layers / split * itemsize
    context = work.length - options.max_tokens / 2  # of a response half of whose tokens are there
    token = launches + (weights + together * context * keys) / (HBM * gpu.hbm)
    return options.max_tokens * -(-requests // together) * token
