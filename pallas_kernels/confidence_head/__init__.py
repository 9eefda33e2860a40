"""Hidden states and the language-model head to token, probability and entropy."""

from pallas_kernels.confidence_head.api import confidence_head
from pallas_kernels.confidence_head.reference import confidence_head_reference
from pallas_kernels.confidence_head.statistics import HeadResult, merge
from pallas_kernels.confidence_head.traffic import least_bytes, traffic

__all__ = [
    "HeadResult",
    "confidence_head",
    "confidence_head_reference",
    "least_bytes",
    "merge",
    "traffic",
]
