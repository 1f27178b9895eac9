# shellcheck shell=bash
# The environment of every process of a job. What stands in the environment already is kept: override it in the cluster's file
# (`environment:` of configs/cluster/*.yaml) or before sbatch.

export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}           # a rank has a GPU, or a core

# Megatron's overlap of tensor-parallel communication needs one connection up to Hopper
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# NCCL: a collective that fails ends its rank instead of waiting for ever, and says which one it was
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Interfaces are found by themselves. Where that goes wrong (a job that hangs in its first collective), name those between nodes:
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
