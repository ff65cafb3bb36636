"""The arguments of `es.py` beside those of RL: the search, and how its completions are sampled."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class EvolutionArguments:
    """
    How values are searched for. What has the name of an argument of [`~trl.GRPOConfig`] means the same.

    Args:
        output_dir (`str`): Folder of the adapter and of `evolution.jsonl`, a line a step.
        max_steps (`int`, *optional*, defaults to `50`): Generations of candidates.
        population (`int`, *optional*): Candidates a step; by default the library's 4 + 3 ln(values).
        sigma (`float`, *optional*, defaults to `0.1`): First standard deviation of the candidates' values.
        problems_per_step (`int`, *optional*, defaults to `16`): Problems that all candidates of a step are given.
        num_generations (`int`, *optional*, defaults to `1`): Completions of a problem by each candidate.
        temperature (`float`, *optional*, defaults to `1.0`): Of the sampling.
        max_completion_length (`int`, *optional*, defaults to `256`): Limit of a completion, in tokens.
        generation_batch_size (`int`, *optional*, defaults to `256`): Completions generated at once.
        use_vllm (`bool`, *optional*, defaults to `False`): Sample with vLLM, which gets every candidate as a LoRA.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`): `"colocate"`, an engine in this process, or `"server"`.
        vllm_server_base_url (`str`, *optional*): Address of a server (`vllm serve --enable-lora`).
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.9`): Share of the GPU's memory for the engine.
        vllm_max_model_length (`int`, *optional*): Limit of prompt and completion together, for the engine.
        seed (`int`, *optional*, defaults to `0`): Of the problems' order, the candidates and the sampling.
        resume_from_checkpoint (`bool`, *optional*, defaults to `False`): Continue the run in `output_dir`.
        disable_tqdm (`bool`, *optional*, defaults to `False`): No progress bar.
    Raises:
        ValueError: If a value is out of its bounds.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the adapter and of evolution.jsonl."})
    max_steps: int = field(default=50, metadata={"help": "Generations of candidates."})
    population: int | None = field(default=None, metadata={"help": "Candidates a step."})
    sigma: float = field(default=0.1, metadata={"help": "First standard deviation of the candidates' values."})
    problems_per_step: int = field(default=16, metadata={"help": "Problems that all candidates of a step are given."})
    num_generations: int = field(default=1, metadata={"help": "Completions of a problem by each candidate."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the sampling."})
    max_completion_length: int = field(default=256, metadata={"help": "Limit of a completion, in tokens."})
    generation_batch_size: int = field(default=256, metadata={"help": "Completions generated at once."})
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate", metadata={"help": "colocate, an engine in this process, or server."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Address of a server of vLLM's."})
    vllm_gpu_memory_utilization: float = field(default=0.9, metadata={"help": "Share of memory for the engine."})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": "Limit of prompt and completion."})
    seed: int = field(default=0, metadata={"help": "Of the problems' order, the candidates and the sampling."})
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "Continue the run in output_dir."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir is missing: name a folder by --output_dir")
        bounds = {"max_steps": 1, "population": 3, "problems_per_step": 1, "num_generations": 1, "seed": 0}
        bounds |= {"max_completion_length": 1, "generation_batch_size": 1}
        for name, bound in bounds.items():
            given = getattr(self, name)
            if given is not None and (not isinstance(given, int) or given < bound):
                raise ValueError(f"{name} must be an integer of at least {bound}, got {given}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        for name in ("sigma", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}")
        if self.vllm_mode not in ("colocate", "server"):
            raise ValueError(f"vllm_mode must be 'colocate' or 'server', got {self.vllm_mode!r}")
        if self.is_served and not self.vllm_server_base_url:
            raise ValueError("vllm_mode='server' needs an address: --vllm_server_base_url http://localhost:8000")
        if self.vllm_server_base_url and not self.is_served:
            raise ValueError(
                f"vllm_server_base_url={self.vllm_server_base_url!r} is not used: set use_vllm to true and vllm_mode "
                "to 'server', or drop it"
            )

    @property
    def is_served(self) -> bool:
        """Whether a server of vLLM's samples."""
        return self.use_vllm and self.vllm_mode == "server"
