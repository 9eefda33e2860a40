"""The kernels judged by the TPU compiler's schedules, beside what stands in jax already.

``python -m pallas_kernels.report`` prints the figures; ``docs/kernels.md`` says what they mean.
"""
