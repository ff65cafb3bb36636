"""Everything that knows vLLM."""

from .fidelity import SamplingFidelityCallback, sampling_fidelity
from .rollout import AdapterRollout


__all__ = ["AdapterRollout", "SamplingFidelityCallback", "sampling_fidelity"]
