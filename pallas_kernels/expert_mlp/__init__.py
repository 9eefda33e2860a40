"""The routed experts of a mixture: gate, up, SiLU, down, weighted sum."""

from pallas_kernels.expert_mlp.api import expert_mlp
from pallas_kernels.expert_mlp.bytes_moved import least_bytes, traffic
from pallas_kernels.expert_mlp.grouped_matmul import grouped_matmul
from pallas_kernels.expert_mlp.reference import expert_mlp_reference
from pallas_kernels.expert_mlp.tuning import MAX_TOKENS

__all__ = [
    "MAX_TOKENS",
    "expert_mlp",
    "expert_mlp_reference",
    "grouped_matmul",
    "least_bytes",
    "traffic",
]
