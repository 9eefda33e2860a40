"""The block-diffusion decoder: parameters, rules, state, the compiled loop, traces."""

from llada_jax.decoding.decoder import Decoder, DecodeResult, StepRecord, result_of
from llada_jax.decoding.denoiser import Denoiser, ModelDenoiser
from llada_jax.decoding.params import SamplingError, SamplingParams
from llada_jax.decoding.state import DecodeState, Phase, RowSettings
from llada_jax.decoding.trace import Trace, TraceStep, steps_of_record

__all__ = [
    "DecodeResult",
    "DecodeState",
    "Decoder",
    "Denoiser",
    "ModelDenoiser",
    "Phase",
    "RowSettings",
    "SamplingError",
    "SamplingParams",
    "StepRecord",
    "Trace",
    "TraceStep",
    "result_of",
    "steps_of_record",
]
